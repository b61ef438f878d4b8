"""The one interface of all data sets: files, tar shards, the generated world.

    item   {"video": uint8 (T, H, W, 3), "labels": {question: int}, "path": str, "bad": [...],
            "part": a video.rows.Part or None = all of it, "clip": a number that tells clips apart,
            and where there are any "caption", "captions", "question", "answer", "candidates"}
    batch  the same of several clips: "video" uint8 (B, T, H, W, 3),
           "labels" {question: int64 (B,)}, lists of the rest; see data.batches

A clip may have several answers to the questions in `several`. Its label is then a uint8 or float32
vector (Y,) with a one for each, in a batch float32 (B, Y).

A stage that knows only this interface runs on any of them.
"""

from video.annotations import DataError


class ClipSet:
    """What every data set offers. Subclasses add items; some redefine what follows."""

    source = ""  # the name for messages
    classes = {}  # {question: names in label order}; {} = no labels
    in_order = True  # True: the order of classes is official, False: it is our own
    several = frozenset()  # the questions to which a clip may have several answers
    weights = None  # how often each item is drawn in training, (items,), sum 1; None = all alike
    captions = None  # of files: parallel to the items; None = none
    states_facts = False  # True: `facts_in` can tell what a sentence states
    prompts_combine_by = "probabilities"  # how `sentences` are averaged: see clip_video.zero_shot
    limit = ""  # of what can be reached, for the protocol; "" = none

    @property
    def has_captions(self):
        """True where items have captions."""
        return self.captions is not None

    def summary(self):
        """One line for the user: what it is, how much, a sample."""
        return self.source

    def first(self, count):
        """Keep `count` clips, always the same. Returns self."""
        raise DataError(f"{self.source}: cannot be cut to {count} clips; give a folder or a list")

    def only(self, question, names):
        """Keep only clips of these classes, numbered in this order. Returns self."""
        raise DataError(f"{self.source}: cannot leave out classes; give a folder or a list")

    def labels_of(self, question):
        """The labels of all items, in order. DataError where an item has none."""
        raise DataError(f"{self.source}: its classes cannot be counted; give a folder or a list")

    def by_video(self):
        """One item for each video, with all its captions. Returns self."""
        return self

    def absent_classes(self):
        """Names of the classes that no clip has; [] where that is not known."""
        return []

    def captions_of(self, places):
        """How many captions the items with these numbers have together."""
        return len(places)

    def training_captions(self):
        """Captions to learn a vocabulary from. DataError where there are none, or one is empty."""
        raise DataError(f"{self.source}: has no captions; give a CSV file with a header "
                        "'path,caption', or a .jsonl file of {\"path\": ..., \"caption\": ...}")

    def training_questions(self):
        """Pairs (question, answer). DataError where one is missing."""
        raise DataError(f"{self.source}: a question or an answer is missing; give JSON, JSONL or "
                        "CSV with video, question and answer")

    def sentences(self, prompts):
        """Sentences for zero-shot recognition: {question: [[sentence of each class], ...]}.

        One list for each prompt, in which {} is replaced by the class name.
        """
        return {question: [[prompt.replace("{}", name.replace("_", " ")) for name in names]
                           for prompt in prompts] for question, names in self.classes.items()}

    def references(self, batch):
        """Every true sentence about each clip of a batch: a list of tuples of str."""
        return batch["captions"]

    def choices(self, batch):
        """Multiple choice: [(sentences, place of the right one), ...]; [] where there is none."""
        return [(options, options.index(text))
                for options, text in zip(batch.get("candidates", ()), batch["caption"])]

    def facts_in(self, sentence):
        """{question: name} that a sentence states, where that can be read off; else {}."""
        return {}
