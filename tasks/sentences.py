"""Base of the stages whose model reads text: `clip`, `retrieve` and `answer`."""

from dataclasses import dataclass

from engine.errors import UserError
from engine.stage import ClipStage, flag
from weights.tokenizer import tokenizer_of


@dataclass
class SentenceStage(ClipStage):
    """A stage with a tokenizer, `self.bpe`. A run saves it beside its weights."""

    tokenizer: str = flag("", "tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz; default: the "
                          "one beside --weights")

    def read_tokenizer(self, config, context=0):
        """Set `self.bpe`, the tokenizer of --weights.

        config   configuration of the VideoCLIP in --weights
        context  maximum tokens of a text; UserError if the model reads fewer
        """
        if context > config["context"]:
            raise UserError(f"--context {context}: the weights read at most {config['context']} "
                            "tokens")
        self.bpe = tokenizer_of(self.weights, self.tokenizer, config["vocabulary"])

    def extras(self, folder):
        """tokenizer.json"""
        self.bpe.save(folder)
