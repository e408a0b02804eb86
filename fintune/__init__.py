"""What the stages share: parameters, records, prompts, models, training, scoring, tracking."""

import os

# bitsandbytes and torch bring an OpenMP pool each. Threads that spin while they wait steal the cores
# from the other pool: on two busy cores 4-bit training is then ten times slower. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A loader process that is forked after the tokenizer was used would only warn about it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
