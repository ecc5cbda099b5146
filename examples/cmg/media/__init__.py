"""Media files: find the clips of a folder, decode them, and encode them to features.

`folder` finds the files of each clip, with labels and splits. `decode` reads frames and sound at
their times, and captions. `encoders` has what is built in and `pretrained` the models of other
libraries. `extract` writes the features of all clips as a data set, see `cmg.data`.
"""
