"""What encoders are used for: metrics of tasks, their models and stages, and bases of stages.

recognition.py, retrieval.py, captioning.py, question_answering.py, localisation.py   the tasks
reconstruction.py       stages that hide a part of each clip, and pictures of what is predicted
sentences.py            what stages that read text share
caption_search.py       captions by beam search and by nucleus sampling
video_text.py, two_encoders.py   what stages 2 and 4 in train.py have besides their recipe
"""
