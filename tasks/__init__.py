"""What encoders are used for: metrics of tasks, their models and stages, and bases of stages.

recognition.py, retrieval.py, captioning.py, question_answering.py, localisation.py   the tasks
class_names.py          which row of a head each class of a data set is
probes.py               a classifier on the features of a frozen encoder
predictions.py          what a classifier says of each clip: a table, a picture, a command
labelled.py             what stages with labels share
reconstruction.py       stages that hide a part of each clip, and pictures of what is predicted
sentences.py            what stages that read text share
caption_search.py       captions by beam search and by nucleus sampling
video_text.py, two_encoders.py   what stages 2 and 4 in train.py have besides their recipe
"""
