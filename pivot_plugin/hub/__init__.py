"""The Hub, asked and written to so that what stands there is known afterwards; for encoders and for pairs.

repository.py    a repository that something is published in
secrets.py       what is shown of the client's errors
"""
