"""gptlib: GPT-2 from data to samples, one module per chapter of the book it is tangled from.

corpus         what a language model reads          training       the training loop
tokenizer      text to numbers and back             sampling       drawing text
batches        a file of tokens to batches          speed          time and memory
attention      one causal head                      evaluation     what a loss means
multi_head     several heads in one matmul          exchange       to and from transformers
block          attention, MLP, residual stream      pretraining    the full run
gpt            the model                            tinywiki       a corpus of known entropy
objective      loss, optimiser, schedule            checkpoints, devices, distribution, watching
"""

__version__ = "0.1.0"
