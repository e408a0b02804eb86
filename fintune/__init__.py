"""What the stages share: parameters, records, prompts, models, training, scoring, tracking."""

import logging
import os

# bitsandbytes and torch bring an OpenMP pool each. Threads that spin for long while they wait take the
# cores from the other pool: with two jobs on two cores 4-bit training is then ten times slower. A short
# spin costs nothing on an idle machine (never spinning costs a fifth). Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# A loader process that is forked after the tokenizer was used would only warn about it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Names an optional kernel package each time it is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
