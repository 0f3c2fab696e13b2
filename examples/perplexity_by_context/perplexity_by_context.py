"""Perplexity of the same targets under several context lengths, as an `evaluate` module."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
How well a language model predicts the same target tokens when it is given more and more context.
The metric computes no loss: it takes the negative log-likelihoods of blocks of target tokens,
refuses to compare context lengths whose targets differ, and adds standard errors.
"""

INPUTS = """
Args:
    contexts: the context length in tokens of each block.
    documents: the document that holds each block.
    starts: the position in the document, in tokens, of the block's first target.
    targets: the block's target token ids.
    losses: the negative log-likelihood of each target in nats, in the same order.
    text_bytes: the length in UTF-8 bytes of the block's text.

Returns:
    `contexts`, ascending, and for each of them lists of
    `perplexity`: exp of the mean loss over all target tokens;
    `bits_per_byte`: the summed loss in bits over the summed bytes;
    `bits_saved_per_byte`: bits per byte under the shortest context minus bits per byte under this one;
    and, with the suffix `_error`, the standard error of each. Blocks of one document are alike, so documents
    are the independent samples (blocks, where all stand in one document); the saving is compared
    document by document, so its error is small where documents differ but all gain alike. One
    sample has no standard error: nan. `tokens`, `bytes`, `blocks` and `documents` count the
    targets.
"""

CITATION = """
@article{ding2023longnet,
  title={LongNet: Scaling Transformers to 1,000,000,000 Tokens},
  author={Ding, Jiayu and Ma, Shuming and Dong, Li and Zhang, Xingxing and Huang, Shaohan and
          Wang, Wenhui and Zheng, Nanning and Wei, Furu},
  journal={arXiv preprint arXiv:2307.02486},
  year={2023}
}
"""


class PerplexityByContext(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        value, sequence = datasets.Value, datasets.Sequence
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "contexts": value("int64"),
                    "documents": value("string"),
                    "starts": value("int64"),
                    "targets": sequence(value("int64")),
                    "losses": sequence(value("float64")),
                    "text_bytes": value("int64"),
                }
            ),
        )

    def _compute(self, contexts, documents, starts, targets, losses, text_bytes) -> dict:
        table = {context: {} for context in sorted(set(contexts))}
        rows = zip(contexts, documents, starts, targets, losses, text_bytes, strict=True)
        for context, document, start, block_targets, block_losses, size in rows:
            block = (document, start, tuple(block_targets), size)
            if block in table[context]:
                raise ValueError(f"Block {start} of {document!r} is given twice at {context}.")
            if len(block_losses) != len(block_targets) or not np.all(np.isfinite(block_losses)):
                raise ValueError(
                    f"Block {start} of {document!r} needs one finite loss for each of its "
                    f"{len(block_targets)} targets at context {context}."
                )
            table[context][block] = sum(block_losses)
        return summarize(table)


def summarize(table: dict[int, dict[tuple, float]]) -> dict:
    """Compute the values that `INPUTS` names from nats by context and block."""
    shortest = min(table)
    blocks = sorted(table[shortest])
    for context, losses in table.items():
        if losses.keys() != table[shortest].keys():
            raise ValueError(
                f"The targets at context {context} are not those at context {shortest}: perplexity "
                "by context compares the same targets. Give every block at every context."
            )
    documents = [block[0] for block in blocks]
    samples = documents if len(set(documents)) > 1 else [block[1] for block in blocks]
    tokens = np.array([len(block[2]) for block in blocks])
    sizes = np.array([block[3] for block in blocks])
    nats = np.array([[table[context][block] for block in blocks] for context in table])
    bits = nats / np.log(2)
    results = {"contexts": list(table)}
    means = [ratio(row, tokens, samples) for row in nats]
    results["perplexity"] = [float(np.exp(mean)) for mean, _ in means]
    results["perplexity_error"] = [float(np.exp(mean) * error) for mean, error in means]
    for name, values in (("bits_per_byte", bits), ("bits_saved_per_byte", bits[0] - bits)):
        ratios = [ratio(row, sizes, samples) for row in values]
        results[name] = [value for value, _ in ratios]
        results[f"{name}_error"] = [error for _, error in ratios]
    counts = {"tokens": tokens.sum(), "bytes": sizes.sum()}
    counts |= {"blocks": len(blocks), "documents": len(set(documents))}
    return results | {name: int(count) for name, count in counts.items()}


def ratio(amounts: np.ndarray, sizes: np.ndarray, samples: list) -> tuple[float, float]:
    """Return `sum(amounts) / sum(sizes)` and its standard error over independent samples.

    The linearised variance of a ratio of sums (Cochran, Sampling Techniques, section 6.4): with
    residual e_s = amount_s - ratio * size_s of each of n samples,
    error = sqrt(n / (n - 1) * sum(e_s ** 2)) / sum(sizes).
    """
    _, index = np.unique(samples, return_inverse=True)
    value = amounts.sum() / sizes.sum()
    residuals = np.bincount(index, weights=amounts - value * sizes)
    count = len(residuals)
    if count == 1:
        return float(value), float("nan")
    error = np.sqrt(count / (count - 1) * np.sum(residuals**2)) / sizes.sum()
    return float(value), float(error)
