"""One run, from settings to result.

optimize.py instruct.py              the verbs
settings.py                          options of a run into TRL's configuration
folder.py in_place.py                the run's folder; a model trained in place, or left as it was
monitoring.py generalization_recorder.py   what is looked at while a run goes on
result.py provenance.py              what comes out, and where it comes from
"""
