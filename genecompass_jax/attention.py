"""Attention inside cells: five ways to compute the same thing.

A row may hold several cells (`segments_BL`), and a gene looks at the genes of
its own cell alone. The ways differ in speed, memory and where they run:

  xla      all scores at once; every platform, every precision
  chunked  the same, some queries at a time: memory grows with the row's
           length, not with its square
  splash   the Pallas kernel for TPUs
  pallas   the Pallas kernel for NVIDIA GPUs; rows of one or several cells
  cudnn    cuDNN's kernel for NVIDIA GPUs; one cell a row, bfloat16 only

`choose` says which one 'auto' is. The kernels know no dropout of attention
probabilities: there `attention_dropout` is without effect. Slots of padding
give numbers that nobody reads, and that differ from way to way.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from genecompass_jax import chunked_attention, errors, layers, sharding

Array = jax.Array

KINDS = ('auto', 'xla', 'chunked', 'splash', 'pallas', 'cudnn')
FUSED = ('splash', 'pallas', 'cudnn')
# What the 'attention' policy of recomputation keeps.
KEPT = 'attention'

_LONG = 4096  # slots from which the scores of a row would fill memory
_LANES = 128  # of a TPU's vector unit: kernels take multiples


def choose(
  kind: str, *, platform: str, dtype: str, one_cell_a_row: bool
) -> str:
  """What 'auto' is on a platform; other kinds are checked and given back.

  Args:
    kind: one of `KINDS`.
    platform: of the devices: 'tpu', 'gpu' ('cuda', 'rocm') or 'cpu'.
    dtype: of the model's products.
    one_cell_a_row: whether all rows hold one cell, from their first slot on.

  Returns:
    'splash', 'pallas' or 'cudnn' for bfloat16 on accelerators, otherwise
    'auto', which is 'xla' or 'chunked': see `attend`.

  Raises:
    UserError: the kind cannot do what is asked.
  """
  is_gpu = platform in ('gpu', 'cuda')
  if kind == 'auto':
    if dtype == 'float32' or platform not in ('tpu', 'gpu', 'cuda'):
      return 'auto'
    if not is_gpu:
      return 'splash'
    return 'cudnn' if one_cell_a_row else 'pallas'
  if kind == 'cudnn' and (not one_cell_a_row or dtype == 'float32'):
    raise errors.UserError(
      "model.attention='cudnn' takes one cell a row, in bfloat16: set "
      "data.layout='buckets', model.use_cls=true and model.dtype='bfloat16', or "
      "take 'pallas'"
    )
  needed = {'splash': platform == 'tpu', 'pallas': is_gpu, 'cudnn': is_gpu}
  if not needed.get(kind, True):
    raise errors.UserError(
      f'model.attention={kind!r} does not run on {platform}: set it to auto'
    )
  return kind


def attend(
  query_BLHK: Array,
  key_BLHK: Array,
  value_BLHK: Array,
  segments_BL: Array,
  *,
  kind: str,
  dropout_rate: float = 0.0,
  dropout_keys_B: Array | None = None,
  key_bias_BL: Array | None = None,
  keep_probabilities: bool = False,
  interpret: bool = False,
) -> Array:
  """Scaled dot-product attention inside segments.

  Args:
    query_BLHK: of every slot and head, in the precision of the products.
    key_BLHK: likewise.
    value_BLHK: likewise.
    segments_BL: cell of each slot, 0 in padding, which no gene looks at.
    kind: one of `KINDS`; 'auto' is 'xla' where probabilities of rows of less
      than 4,096 slots are dropped, else 'chunked'.
    dropout_rate: of probabilities; 'xla' and 'chunked' alone.
    dropout_keys_B: a key a row; None for evaluation.
    key_bias_BL: float32 added to the scores of a key, but for the slot's own
      query; 'xla' alone, which 'auto' is then.
    keep_probabilities: whether the backward pass reads probabilities from
      memory or makes them anew; 'xla' alone.
    interpret: run the Pallas kernels in Python, for tests without the device.

  Returns:
    [B, L, H, K] in the type of the query.

  Raises:
    ValueError: a bias of keys for a kind that knows none.
  """
  length, head_dim = query_BLHK.shape[1], query_BLHK.shape[3]
  draws = dropout_keys_B is not None and dropout_rate > 0
  if key_bias_BL is not None:
    if kind not in ('auto', 'xla'):
      raise ValueError(f'attention {kind!r} takes no bias of keys')
    kind = 'xla'
  if kind == 'auto':
    # Chunks take less time and memory (experiments/benchmarks/waterfall.py, on
    # two CPU cores; accelerators, which take this in float32 alone, were not
    # measured). But they draw dropout twice, which takes longer than to read
    # probabilities back.
    kind = 'chunked' if length >= _LONG or not draws else 'xla'
  scale = 1 / math.sqrt(head_dim)
  if kind == 'splash':
    kernel = functools.partial(_splash, interpret=interpret)
    query_BLHK = query_BLHK * jnp.asarray(scale, query_BLHK.dtype)
  elif kind == 'pallas':
    kernel = functools.partial(_pallas, scale=scale, interpret=interpret)
  elif kind == 'cudnn':
    kernel = functools.partial(_cudnn, scale=scale)
  elif kind == 'chunked':
    kernel = functools.partial(
      chunked_attention.attend, scale=scale, kept=KEPT, rate=dropout_rate
    )
    # Alone the compiler shares rows and heads, but not the chunks of a row.
    # What is dropped is drawn by row: devices that share one draw the same.
    mesh = jax.sharding.get_abstract_mesh()
    shares_rows = sharding.is_shared(mesh) and mesh.shape[sharding.CONTEXT] > 1
    if draws or not shares_rows:
      return kernel(
        *(query_BLHK, key_BLHK, value_BLHK, segments_BL, segments_BL),
        dropout_keys_B,
      )
  else:
    plain = functools.partial(_plain, scale=scale, rate=dropout_rate)
    if not keep_probabilities:
      plain = layers.recomputed(plain)
    out_BLHK = plain(
      *(query_BLHK, key_BLHK, value_BLHK, segments_BL, segments_BL),
      *(dropout_keys_B, key_bias_BL),
    )
    return checkpoint_name(out_BLHK, KEPT)
  return _on_each_device(kernel)(
    query_BLHK, key_BLHK, value_BLHK, segments_BL, segments_BL
  )


def attend_from_first(
  query_B1HK: Array,
  key_BMHK: Array,
  value_BMHK: Array,
  segments_BM: Array,
  *,
  key_bias_BL: Array | None = None,
) -> Array:
  """Attention of the first slot alone, in float32.

  Args:
    query_B1HK: float32, of the first slot.
    key_BMHK: of all slots, in any type.
    value_BMHK: likewise.
    segments_BM: above 0 in slots of the row's one cell.
    key_bias_BL: as in `attend`.

  Returns:
    [B, 1, H, K] float32.
  """
  # Sums of products in place of products of matrices: keys and values are read
  # once, and no copy of them in float32 is kept.
  scores_BMH = jnp.sum(query_B1HK * key_BMHK.astype(jnp.float32), axis=-1)
  scores_BMH *= 1 / math.sqrt(query_B1HK.shape[-1])
  if key_bias_BL is not None:
    scores_BMH += key_bias_BL.at[:, 0].set(0.0)[..., None]
  is_seen_BM1 = (segments_BM > 0)[..., None]
  lowest = jnp.finfo(jnp.float32).min
  probs_BMH = jax.nn.softmax(jnp.where(is_seen_BM1, scores_BMH, lowest), axis=1)
  out_BHK = jnp.sum(probs_BMH[..., None] * value_BMHK.astype(jnp.float32), 1)
  return out_BHK[:, None]


def _on_each_device(kernel):
  """A kernel on the shards of a mesh.

  Queries stay where they lie. Keys and values are gathered over the context
  axis: every query needs all of its row.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not sharding.is_shared(mesh):
    return kernel
  spec = jax.sharding.PartitionSpec
  rows, context = sharding.batch_axes(), sharding.CONTEXT
  queries = spec(rows, context, sharding.TENSOR, None)
  keys = spec(rows, None, sharding.TENSOR, None)
  return jax.shard_map(
    kernel,
    in_specs=(queries, keys, keys, spec(rows, context), spec(rows, None)),
    out_specs=queries,
    check_vma=False,
  )


def _plain(
  query_BLHK,
  key_BMHK,
  value_BMHK,
  query_segments_BL,
  segments_BM,
  dropout_keys_B,
  key_bias_BM=None,
  *,
  scale,
  rate,
) -> Array:
  """All scores at once, softmax in float32."""
  # On [B, H, L, M], the largest arrays of a step, as little as possible: the
  # scale goes to the queries, and the mask is added.
  added_BLM = chunked_attention.added_to_scores(query_segments_BL, segments_BM)
  if key_bias_BM is not None:
    # A slot sees itself as ever.
    others_LM = 1 - jnp.eye(*added_BLM.shape[1:], dtype=jnp.float32)
    added_BLM += key_bias_BM[:, None] * others_LM
  query_BLHK = query_BLHK * jnp.asarray(scale, query_BLHK.dtype)
  scores_BHLM = jnp.einsum(
    'BLHK,BMHK->BHLM',
    query_BLHK,
    key_BMHK,
    preferred_element_type=jnp.float32,
  )
  probs_BHLM = jax.nn.softmax(scores_BHLM + added_BLM[:, None], axis=-1)
  probs_BHLM = layers.dropout(probs_BHLM, rate, dropout_keys_B)
  return jnp.einsum(
    'BHLM,BMHK->BLHK', probs_BHLM.astype(value_BMHK.dtype), value_BMHK
  )


def block_size(length: int, largest: int = 512) -> int:
  """The largest block of a kernel that divides a row, a multiple of 128.

  Raises:
    UserError: 128 does not divide the row.
  """
  if length % _LANES:
    raise errors.UserError(
      f'rows of {length} slots: kernels take multiples of {_LANES}; set '
      'data.slots or data.buckets so, or model.attention=xla'
    )
  fitting = range(_LANES, min(length, largest) + 1, _LANES)
  return max(size for size in fitting if length % size == 0)


def _splash(
  query_BLHK, key_BMHK, value_BMHK, query_segments_BL, segments_BM, *, interpret
) -> Array:
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  _, length, num_heads, _ = query_BLHK.shape
  q = block_size(length)
  k = block_size(key_BMHK.shape[1])
  sizes = splash.BlockSizes(
    block_q=q,
    block_kv=k,
    block_kv_compute=k,
    block_q_dkv=q,
    block_kv_dkv=k,
    block_kv_dkv_compute=k,
    use_fused_bwd_kernel=True,  # one pass in place of two over the scores
  )
  whole = splash.FullMask((length, key_BMHK.shape[1]))
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([whole] * num_heads),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=KEPT,
    interpret=interpret,
  )

  def one_row(query_LHK, key_MHK, value_MHK, query_segments_L, segments_M):
    heads_first = (jnp.swapaxes(x, 0, 1) for x in (query_LHK, key_MHK,
                                                   value_MHK))  # fmt: skip
    ids = splash.SegmentIds(query_segments_L, segments_M)
    return jnp.swapaxes(kernel(*heads_first, ids), 0, 1)

  return jax.vmap(one_row)(
    query_BLHK, key_BMHK, value_BMHK, query_segments_BL, segments_BM
  ).astype(query_BLHK.dtype)


def _pallas(
  query_BLHK,
  key_BMHK,
  value_BMHK,
  query_segments_BL,
  segments_BM,
  *,
  scale,
  interpret,
) -> Array:
  from jax.experimental.pallas.ops.gpu import attention as kernels

  if query_BLHK.shape[1] != key_BMHK.shape[1]:
    raise errors.UserError(
      "model.attention='pallas' takes whole rows: set mesh.context=1, or "
      'model.attention=chunked'
    )
  del query_segments_BL
  block = block_size(query_BLHK.shape[1], 128)
  sizes = kernels.BlockSizes(
    block_q=block,
    block_k=min(block, 64),
    block_q_dkv=32,
    block_kv_dkv=32,
    block_q_dq=32,
    block_kv_dq=32,
  )
  # The optional arguments stand by place: the function takes them so alone.
  out_BLHK = kernels.mha(
    query_BLHK,
    key_BMHK,
    value_BMHK,
    segments_BM,
    scale,
    False,  # not causal
    sizes,
    'triton',
    None,
    2,
    None,
    interpret,
  )
  return checkpoint_name(out_BLHK, KEPT)


def _cudnn(
  query_BLHK, key_BMHK, value_BMHK, query_segments_BL, segments_BM, *, scale
) -> Array:
  if query_BLHK.shape[1] != key_BMHK.shape[1]:
    raise errors.UserError(
      "model.attention='cudnn' takes whole rows: set mesh.context=1"
    )
  del query_segments_BL
  lengths_B = jnp.sum(segments_BM > 0, axis=1, dtype=jnp.int32)
  out_BLHK = jax.nn.dot_product_attention(
    query_BLHK,
    key_BMHK,
    value_BMHK,
    scale=scale,
    query_seq_lengths=lengths_B,
    key_value_seq_lengths=lengths_B,
    implementation='cudnn',
  )
  return checkpoint_name(out_BLHK, KEPT)
