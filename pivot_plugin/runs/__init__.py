"""One run, from settings to result.

optimize.py instruct.py       the verbs
run.py                        what a run is, and the steps that the verbs share
settings.py                   options of a run into TRL's configuration
folder.py in_place.py         the run's folder; a model trained in place, or left as it was
monitoring.py                 what is looked at while a run goes on
result.py provenance.py       what comes out, and where it comes from
"""
