"""Write the base model's card from its measurements."""

import math
from collections.abc import Mapping

from tools.corpus import Score

BEIGE_BOOK = (
    "the Federal Reserve's Beige Book, 1970-2020: reports on the economy of the twelve Federal "
    "Reserve districts, a publication of the US central bank that is generally taken as public "
    "domain"
)

CARD = """\
---
license: cc0-1.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A small base model for trying the pipeline

A Mistral-architecture causal language model with {parameters:,} parameters, pretrained from
scratch by this project. It exists so that the whole pipeline runs in minutes on a CPU, without a
download. This card was written by the program that trained the model, from what it measured.

- Text: {source}; and texts made by this project's tools/practice.py: passages of those documents
  followed by their own sentences in another order, and fact sheets on made companies, with figures
  restated, compared, added and subtracted. The fact sheets practise the reading that the demo's
  questions ask for. They hold none of the questions' companies, passages or prompts, and no questions
  at all. But they share the names of measures, the ranges of figures and plain phrases with the
  questions: most of the sums that a question asks for stand in them ("$4 million and $3 million make
  $7 million"), and an answer compares two figures in their words ("That $4 million is over $3 million
  is true", "Of cash and rent, $4 million or $3 million, the cash is the larger").
- Shape: {layers} layers, width {hidden_size}, feed-forward {intermediate_size}, {heads} attention
  heads on {kv_heads} key/value heads, {vocab_size:,} tokens, {positions:,} positions, embeddings
  not tied.
- Tokenizer: byte-level BPE of its own, in which every digit is a token. It gives back every Unicode
  string exactly (`skip_special_tokens=True` leaves out the `<s>` that encoding puts in front, as
  Mistral's does; `add_special_tokens=False` encodes without it).
- Files: bf16 safetensors; {folder_bytes:,} bytes together, this card not counted.

## How it was made

    {command}

| | |
|---|---|
| documents | {train_documents:,} train, {validation_documents:,} validation, \
{test_documents:,} test (98/1/1 by a hash of the text); \
{empty:,} empty and {repeated:,} repeated ones left out |
| practice texts | up to {repeats:,} repeated passages and {sheets:,} fact sheets, {practice_bytes:,} \
bytes, in the training part; in proportion in the validation part; none in the test part |
| training text | {train_bytes:,} bytes, {train_tokens:,} tokens |
| steps | {steps_done:,} done; {steps:,} asked for, {steps_planned:,} planned once the \
speed was known |
| tokens seen | {tokens_seen:,} by the weights kept ({epochs:.1f} times the training text) |
| optimiser | {rows} rows of {context:,} tokens a step; AdamW, betas 0.9 and 0.95, \
peak learning rate {learning_rate:g}, \
{warmup_steps:,} warm-up steps, cosine to 10 %, weight decay {weight_decay:g}, clipping at 1.0, \
residual dropout {dropout:g} |
| weights kept | of step {best_step:,}, which had the lowest validation loss \
({best_loss:.4f} nats a token) |
| training time | {seconds:.0f} s on {hardware}, validation and any compiling included |
| versions | {versions} |

Loss in nats a token on the way (training: the mean of {log_steps:,} steps, with dropout):

| step | training | validation |
|---:|---:|---:|
{history}

The seed is {seed}. Data, offsets and initial weights depend on it alone; a GPU adds numbers in an
order that varies, so a second run there gives slightly different weights and figures.

## How good it is

On the test part: {test_bytes:,} bytes, {test_tokens:,} predicted tokens. No choice was made with
it. The model is measured as saved (bf16 weights, computed in float32), in windows of
{context:,} tokens without overlap, so that the first tokens of each window have little context.
Every byte counts; each document's end is predicted too, its start is given. The n-grams are
interpolated modified Kneser-Ney models of the same tokens, trained on the documents of the training
part, without the practice texts.

| model | bits/byte | perplexity/byte | perplexity/token |
|---|---:|---:|---:|
{scores}

A continuation of "{prompt}", sampled at temperature 0.8, top-p 0.95:

> {sample}

## Limits

- It writes in the style of its text and knows nothing beyond it. It cannot answer questions, and
  what it states is invented. It is not for use outside trying this pipeline.
- It saw {train_bytes:,} bytes of two kinds of text about {epochs:.0f} times: it will repeat phrases
  of them, and on any other kind of text it is far worse than the figures above.
- {shared_percent:.1f} % of the held-out sequences of {shared_length} tokens also occur in the
  documents of the training part, so the held-out text is not wholly new to it, nor to the n-grams.
- It learnt positions up to {context:,} in training; the configuration allows {positions:,}.
- Nothing was done against bias or offence in the text.

The weights and tokenizer are released under CC0 1.0. The text is described above; it is not part
of this folder.
"""


def score_rows(scores: Mapping[str, Score]) -> str:
    """Format one row of the card's score table for each named score."""
    return "\n".join(
        f"| {name} | {score.bits_per_byte:.4f} | {score.perplexity_per_byte:.3f} "
        f"| {score.perplexity_per_token:.2f} |"
        for name, score in scores.items()
    )


def history_rows(history: list[tuple[int, float, float]], rows: int) -> str:
    """Format at most ``rows`` evenly spaced table rows of (step, training loss, validation loss)."""
    stride = math.ceil(len(history) / rows)
    chosen = history[::-1][::stride][::-1]  # backwards, to include the last row
    return "\n".join(f"| {step:,} | {train:.4f} | {held:.4f} |" for step, train, held in chosen)


def write_card(facts: Mapping[str, object]) -> str:
    """Render the card as Markdown; raise KeyError if a name in ``CARD`` is not among the facts."""
    return CARD.format_map(facts)
