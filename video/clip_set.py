"""The interface of all data sets: video files, tar shards, generated clips.

    item   {"video": uint8 (T, H, W, 3), "labels": {question: int}, "path": str, "bad": [...],
            "part": video.rows.Part, None = the whole video, "clip": a number that identifies the
            clip}, and in some data sets "caption", "captions", "question", "answer", "candidates"
    batch  several items: "video" uint8 (B, T, H, W, 3), "labels" {question: int64 (B,)}, lists of
           the rest; see data.batches

A question is a set of classes. Most data sets have one, "label"; others have "verb" and "noun".
A clip may have several classes of a question in `several`. Its label is then a vector (Y,), uint8
or float32, with 1 for each class of the clip; in a batch float32 (B, Y).

Stages use only this interface, so they run on every data set.
"""

from video.annotations import DataError


class ClipSet:
    """The interface with its defaults. Subclasses provide items and override what differs."""

    source = ""  # name of the data set in messages
    classes = {}  # {question: names in label order}; {} = no labels
    official_order = True  # True: the class order is official; False: ours, sorted
    several = frozenset()  # questions that may have several classes per clip
    weights = None  # (items,): probability of each item in training; None = equal
    captions = None  # of files: one per item; None = no captions
    can_read_facts = False  # True: `facts_in` reads classes from sentences
    prompt_average = "probabilities"  # averaged over prompts: see clip_video.zero_shot
    limit = ""  # the best result that is possible, as text for reports

    @property
    def has_captions(self):
        """True where items have captions."""
        return self.captions is not None

    def summary(self):
        """One line for the user: the source, its size, a sample."""
        return self.source

    def first(self, count):
        """Keep `count` clips, the same ones in every run. Returns self."""
        raise DataError(f"{self.source}: cannot keep only {count} clips; give a folder or a list")

    def only(self, question, names):
        """Keep only clips of these classes, numbered in this order. Returns self."""
        raise DataError(f"{self.source}: cannot select classes; give a folder or a list")

    def labels_of(self, question):
        """The labels of all items, in order. DataError where an item has none."""
        raise DataError(f"{self.source}: its classes cannot be counted; give a folder or a list")

    def one_item_per_video(self):
        """Keep one item per video, with all its captions. Returns self."""
        return self

    def classes_without_clips(self):
        """Names of classes without a clip; [] where this is unknown."""
        return []

    def count_captions(self, indices):
        """Total number of captions of the items with these indices."""
        return len(indices)

    def training_captions(self):
        """Captions to build a vocabulary from. DataError where there are none or one is empty."""
        raise DataError(f"{self.source}: has no captions; give a CSV file with a header "
                        "'path,caption', or a .jsonl file of {\"path\": ..., \"caption\": ...}")

    def training_questions(self):
        """List of (question, answer). DataError where one is missing."""
        raise DataError(f"{self.source}: a question or an answer is missing; give JSON, JSONL or "
                        "CSV with video, question and answer")

    def sentences(self, prompts):
        """Sentences for zero-shot recognition: {question: [[a sentence per class], ...]}.

        There is one inner list per prompt. Class names replace {} in the prompt.
        """
        return {question: [[prompt.replace("{}", name.replace("_", " ")) for name in names]
                           for prompt in prompts] for question, names in self.classes.items()}

    def references(self, batch):
        """All true sentences about each clip of a batch: a list of tuples of str."""
        return batch["captions"]

    def choices(self, batch):
        """Multiple choice: [(sentences, index of the right one), ...]; [] for other tasks."""
        return [(options, options.index(text))
                for options, text in zip(batch.get("candidates", ()), batch["caption"])]

    def facts_in(self, sentence):
        """{question: class name} that a sentence states; {} where it cannot be read."""
        return {}
