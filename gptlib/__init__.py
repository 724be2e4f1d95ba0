"""gptlib: GPT-2 from data to samples, one module per chapter of the book it is tangled from.

corpus         what a language model reads          training       the training loop
tokenizer      text to numbers and back             sampling       drawing text
batches        windows of tokens                    speed          time and memory
attention      one causal head                      evaluation     what a loss means
multi_head     several heads in one matmul          exchange       to and from transformers
block          attention, MLP, residual stream      pretraining    the full run
gpt            the model                            workshop       what a run of days needs
objective      loss, optimiser, schedule
"""

__version__ = "0.1.0"


class GptlibError(ValueError):
    """What a user can mend: the message is one line that names the value and the cure."""
