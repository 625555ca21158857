"""Where a run comes from, in words that may be published: no path of the machine it ran on."""
