"""What encoders are used for: the metrics, the models and the stages of each task.

recognition.py, retrieval.py, captioning.py, question_answering.py, localisation.py   the tasks
caption_search.py   beam search and nucleus sampling for captions
class_names.py      matches the classes of a data set with the rows of a classifier head
probes.py           classifiers on the features of a frozen encoder
predictions.py      the predictions of a classifier as a table, a picture and a command
labelled.py, reconstruction.py, sentences.py   base stages: with labels, with masks, with text
video_text.py, two_encoders.py                 the shared parts of stages 2 and 4 in train.py
"""
