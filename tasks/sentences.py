"""What the stages with sentences share: `clip`, `retrieve` and `answer`."""

from dataclasses import dataclass

from engine.errors import UserError
from engine.stage import ClipStage, flag
from weights.tokenizer import tokenizer_of


@dataclass
class SentenceStage(ClipStage):
    """A stage whose model reads text. The tokenizer is `self.bpe`, and lies beside the weights."""

    tokenizer: str = flag("", "tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz; default: the "
                          "one beside --weights")

    def read_tokenizer(self, config, context=0):
        """`self.bpe` for --weights, whose VideoCLIP has this configuration. UserError where that
        reads fewer tokens than `context`."""
        if context > config["context"]:
            raise UserError(f"--context {context}: the weights read at most {config['context']} "
                            "tokens")
        self.bpe = tokenizer_of(self.weights, self.tokenizer, config["vocabulary"])

    def extras(self, folder):
        """tokenizer.json"""
        self.bpe.save(folder)
