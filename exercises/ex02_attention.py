"""Attention with a mask.

softmax(q k^T / sqrt(K)) v ("Attention Is All You Need", arXiv 1706.03762, Sec. 3.2.1). The result
is 0 for a query that may not attend to any key. What does softmax return for a row in which all
keys are masked?
"""


def attention(q, k, v, allowed):
    """q (B, heads, Nq, K), k and v (B, heads, Nk, K), allowed (B, 1, Nq, Nk) bool -> as q.

    allowed is True where a query may attend to a key.
    """
    raise NotImplementedError
