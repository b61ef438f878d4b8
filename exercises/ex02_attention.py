"""Attention, with a mask.

softmax(q k^T / sqrt(K)) v ("Attention Is All You Need", arXiv 1706.03762, Sec. 3.2.1). A query that
may look at nothing gets zeros. What does softmax make of a row in which everything is forbidden?
"""


def attention(q, k, v, allowed):
    """q (B, heads, Nq, K), k and v (B, heads, Nk, K), allowed (B, 1, Nq, Nk) bool -> as q.

    allowed is True where a query may look at a key.
    """
    raise NotImplementedError
