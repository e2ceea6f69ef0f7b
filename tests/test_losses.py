import jax
import numpy as np

from genecompass_jax import losses

CONFIG = losses.LossConfig()


def slots(seed=0, shape=(2, 3), size=5):
  rng = np.random.default_rng(seed)
  logits_BKV = rng.normal(size=(*shape, size)).astype(np.float32) * 3
  labels_BK = rng.integers(0, size, shape).astype(np.int32)
  return logits_BKV, labels_BK


def test_id_losses_are_cross_entropies_in_nats():
  logits_BKV, labels_BK = slots()
  p = np.exp(logits_BKV) / np.exp(logits_BKV).sum(-1, keepdims=True)
  expected = -np.log(np.take_along_axis(p, labels_BK[..., None], -1))[..., 0]
  np.testing.assert_allclose(
    losses.id_losses(logits_BKV, labels_BK), expected, rtol=1e-5
  )
  shifted = losses.id_losses(logits_BKV + 1e4, labels_BK)
  np.testing.assert_allclose(shifted, expected, atol=2e-3)  # and no overflow


def test_sums_of_parts_give_the_loss_of_the_whole():
  rng = np.random.default_rng(0)
  id_BK, value_BK = rng.random((2, 4, 6)).astype(np.float32)
  weights_BK = (rng.random((4, 6)) < 0.5).astype(np.float32)
  whole = losses.loss_sums(id_BK, weights_BK, value_BK, weights_BK)
  parts = [
    losses.loss_sums(id_BK[r], weights_BK[r], value_BK[r], weights_BK[r])
    for r in (slice(0, 1), slice(1, 4))
  ]
  added = jax.tree.map(lambda a, b: a + b, *parts)
  np.testing.assert_allclose(added.means(CONFIG), whole.means(CONFIG))
  total, id_loss, value_loss = whole.means(CONFIG)
  used = weights_BK > 0
  np.testing.assert_allclose(id_loss, id_BK[used].mean(), rtol=1e-6)
  np.testing.assert_allclose(value_loss, value_BK[used].mean(), rtol=1e-6)
  np.testing.assert_allclose(total, 0.2 * id_loss + 0.8 * value_loss, rtol=1e-6)


def test_nothing_masked_gives_zero_and_a_zero_gradient():
  logits_BKV, labels_BK = slots()
  zeros = np.zeros((2, 3), np.float32)

  def total(logits):
    id_BK = losses.id_losses(logits, labels_BK)
    sums = losses.loss_sums(id_BK, zeros, id_BK, zeros)
    return sums.means(CONFIG)[0]

  value, grad = jax.value_and_grad(total)(logits_BKV)
  assert value == 0.0
  assert not np.asarray(grad).any()


def test_a_slot_of_no_weight_cannot_poison_the_sum():
  weights = np.array([[1.0, 0.0]], np.float32)
  bad = np.array([[2.0, np.nan]], np.float32)
  sums = losses.loss_sums(bad, weights, bad, weights)
  np.testing.assert_array_equal(sums.means(losses.LossConfig(1, 1)), [4, 2, 2])


def test_a_model_without_values_has_no_value_term():
  weights = np.ones((1, 2), np.float32)
  sums = losses.loss_sums(weights * 3, weights, None, weights)
  total, id_loss, value_loss = sums.means(CONFIG)
  assert (float(id_loss), float(value_loss)) == (3.0, 0.0)
  np.testing.assert_allclose(total, 0.6)
