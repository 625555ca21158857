"""The embedded world: a miniature of the whole job that runs offline on a CPU."""
