"""Convolutions and products in forms that XLA compiles well on the CPU, and its own elsewhere.

They compute the same numbers as `lax.conv_general_dilated` and `lax.dot_general` up to the order
of summation. Which one it is depends on the devices that the program is traced for
(`mesh.target`): a choice inside the program would be a branch that a certificate has to walk.
By the TPU compiler's figures for v5e the CPU's forms would move 2 to 14 times the bytes of the
TPU's own convolutions. Speed-ups were measured on 2 cores with jax 0.10.2 over XLA's own forms,
forward and gradients together:

- a kernel not much larger than its stride (1x1, 3x3 at stride 2, a patch embedding) is a matrix
  product of patches, which take kernel / stride^2 times the memory of the map: 5 times faster for
  1x1 kernels, 1 to 30 times for others, most on small maps;
- a depthwise kernel is a sum of shifted products, 2.7 to 12 times faster; its gradient at stride 1
  is another such sum, and that of its weights, one output row at a time, is twice as fast again;
- for any other kernel XLA makes the gradient of the weights a convolution whose kernel is as large
  as the image, four times slower than sums of matrix products, one output row at a time so that
  they stay in the cache. At stride 1 and many features such sums are over tiles (`tiles`): another
  half (3x3) of that time, and half of the gradient of the map, too;
- products of maps are products of matrices, up to three times faster: otherwise the gradients
  need transposed copies.

Dimension letters: B batch, H height, W width, C features in, D features out.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from convex_jax import mesh as meshes
from convex_jax.models import tiles

_COPIES = 3  # Patches may take this many times the memory of the map.
_LARGE = 1 << 18  # Elements from which it pays to compute an array once, in a conditional.
_WIDE = 64  # Features from which fewer FLOPs outweigh the copies of tiles.
_NHWC = ("NHWC", "HWIO", "NHWC")

Pair = tuple[int, int]


def conv_general_dilated(
  x_BxHxWxC: jax.Array,
  kernel: jax.Array,
  strides: Pair,
  padding: str | list[Pair],
  *,
  lhs_dilation: Pair = (1, 1),
  rhs_dilation: Pair = (1, 1),
  dimension_numbers=None,
  feature_group_count: int = 1,
  precision=None,
) -> jax.Array:
  """`lax.conv_general_dilated` of NHWC images and HWIO kernels, for use in `nn.Conv`.

  Dilations are not supported: no architecture here has one.

  Raises:
    NotImplementedError: a dilation or a precision was given.
  """
  del dimension_numbers  # NHWC, as in `nn.Conv`.
  if (*lhs_dilation, *rhs_dilation) != (1, 1, 1, 1) or precision is not None:
    raise NotImplementedError("no dilation, no precision here; use lax.conv_general_dilated")
  side, groups = (kernel.shape[0], kernel.shape[1]), feature_group_count
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x_BxHxWxC.shape[1:3], side, strides, padding)
  pads = tuple((low, high) for low, high in padding)
  if not _on_cpu():
    return _native(x_BxHxWxC, kernel, strides, pads, groups)
  if groups == 1 and math.prod(side) <= _COPIES * math.prod(strides):
    patches = _patches(tiles.pad(x_BxHxWxC, pads), side, strides)
    return along_last(patches, kernel.reshape(-1, kernel.shape[-1]))
  if groups == x_BxHxWxC.shape[-1] == kernel.shape[-1]:
    return _depthwise(tiles.pad(x_BxHxWxC, pads), kernel, strides)
  if groups > 1:
    return _native(x_BxHxWxC, kernel, strides, pads, groups)
  return _convolve(x_BxHxWxC, kernel, strides, pads)


def _on_cpu() -> bool:
  return meshes.target()[0] == "cpu"


def _patches(x_BxHxWxC: jax.Array, side: Pair, strides: Pair) -> jax.Array:
  """The patch of the padded map under the kernel at each position, as one vector."""
  if side != strides:
    return jnp.concatenate(_taps(x_BxHxWxC, side, strides), axis=-1)
  b, height, width, c = x_BxHxWxC.shape  # Patches that do not overlap: a transpose.
  i, j = height // side[0], width // side[1]
  whole = x_BxHxWxC[:, : i * side[0], : j * side[1]].reshape(b, i, side[0], j, side[1], c)
  return whole.swapaxes(2, 3).reshape(b, i, j, -1)


def _shifted_products(x_BxHxWxC: jax.Array, kernel: jax.Array, strides: Pair) -> jax.Array:
  """Applies to each feature of the padded map its own kernel: a sum of shifted products."""
  weights = kernel.reshape(-1, kernel.shape[-1])
  taps = _taps(x_BxHxWxC, (kernel.shape[0], kernel.shape[1]), strides)
  return functools.reduce(jnp.add, [t * w for t, w in zip(taps, weights, strict=True)])


_depthwise = jax.custom_vjp(_shifted_products, nondiff_argnums=(2,))


def _depthwise_backward(strides, residuals, g_BxIxJxC):
  x_BxHxWxC, kernel = residuals
  side = kernel.shape[:2]
  if strides == (1, 1):
    wide = tiles.pad(g_BxIxJxC, [(n - 1, n - 1) for n in side])
    x_grad = _depthwise(wide, kernel[::-1, ::-1], strides)
  else:
    (x_grad,) = jax.vjp(lambda x: _shifted_products(x, kernel, strides), x_BxHxWxC)[1](g_BxIxJxC)

  def row(i):
    below = lax.dynamic_slice_in_dim(x_BxHxWxC, i * strides[0], side[0], axis=1)
    g = lax.dynamic_slice_in_dim(g_BxIxJxC, i, 1, axis=1)
    dtype = tiles.summed_in(below)
    taps = _taps(below, side, strides)
    return jnp.stack([jnp.sum(tap * g, axis=(0, 1, 2), dtype=dtype) for tap in taps])

  total = tiles.sum_rows(row, g_BxIxJxC.shape[1])
  return x_grad, total.reshape(kernel.shape).astype(kernel.dtype)


_depthwise.defvjp(lambda x, k, *static: (_depthwise(x, k, *static), (x, k)), _depthwise_backward)


def _native(x, kernel, strides, pads, groups=1):
  return lax.conv_general_dilated(
    x, kernel, strides, pads, dimension_numbers=_NHWC, feature_group_count=groups
  )


def _taps(x_BxHxWxC: jax.Array, side: Pair, strides: Pair) -> list[jax.Array]:
  """The slices of the padded map that meet each entry of the kernel, row by row of the kernel."""
  b, height, width, c = x_BxHxWxC.shape
  rows, columns = (height - side[0]) // strides[0], (width - side[1]) // strides[1]
  return [
    lax.slice(
      x_BxHxWxC,
      (0, i, j, 0),
      (b, i + rows * strides[0] + 1, j + columns * strides[1] + 1, c),
      (1, *strides, 1),
    )
    for i in range(side[0])
    for j in range(side[1])
  ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x_BxHxWxC, kernel, strides, pads):
  """A convolution with another form of its kernel's gradient."""
  return _native(x_BxHxWxC, kernel, strides, pads)


def _backward(strides, pads, residuals, g_BxIxJxD):
  x, kernel = residuals
  side, tiled = kernel.shape[:2], strides == (1, 1) and max(kernel.shape[:2]) < tiles.POINTS
  if tiled and min(kernel.shape[2:]) >= _WIDE:
    back = tuple((n - 1 - low, n - 1 - high) for n, (low, high) in zip(side, pads, strict=True))
    x_grad = tiles.convolve(g_BxIxJxD, kernel[::-1, ::-1].swapaxes(2, 3), back)
  else:
    (x_grad,) = jax.vjp(lambda x: _native(x, kernel, strides, pads), x)[1](g_BxIxJxD)
  c, d = kernel.shape[2:]
  if strides == (1, 1) and d < min(c, _WIDE):
    kernel_grad = _from_shifted_outputs(x, g_BxIxJxD, side, pads)
  elif tiled:
    kernel_grad = tiles.kernel_gradient(x, g_BxIxJxD, side, pads)
  else:
    kernel_grad = _from_shifted_inputs(x, g_BxIxJxD, side, strides, pads)
  return x_grad, kernel_grad.astype(kernel.dtype)


_convolve.defvjp(lambda x, k, *static: (_native(x, k, *static), (x, k)), _backward)


def _from_shifted_inputs(x_BxHxWxC, g_BxIxJxD, side, strides, pads):
  """Gradient of the kernel: for each of its entries, the slice that it met, transposed, times g."""
  x_BxHxWxC, d = tiles.pad(x_BxHxWxC, pads), g_BxIxJxD.shape[-1]

  def row(i):
    x = lax.dynamic_slice_in_dim(x_BxHxWxC, i * strides[0], side[0], axis=1)
    g = lax.dynamic_slice_in_dim(g_BxIxJxD, i, 1, axis=1)
    return jnp.stack([_product(tap, g) for tap in _taps(x, side, strides)])

  return tiles.sum_rows(row, g_BxIxJxD.shape[1]).reshape(*side, -1, d)


def _from_shifted_outputs(x_BxHxWxC, g_BxIxJxD, side, pads):
  """The same at stride 1, cheaper if D < C: x, transposed, times g shifted the other way.

  Rows are padded one at a time: for a padded copy XLA would compute g once more, which in a
  DenseNet is a long sum of slices.
  """
  (top, _), (left, right) = pads
  back = ((0, 0), (side[1] - 1 - left, side[1] - 1 - right))
  rows, d = g_BxIxJxD.shape[1], g_BxIxJxD.shape[3]

  def g_row(i):
    row = lax.dynamic_slice_in_dim(g_BxIxJxD, jnp.clip(i, 0, rows - 1), 1, axis=1)
    return jnp.where((i >= 0) & (i < rows), row, 0)

  def row(i):
    x = lax.dynamic_slice_in_dim(x_BxHxWxC, i, 1, axis=1)
    met = [g_row(i + top - j) for j in range(side[0] - 1, -1, -1)]
    g = tiles.pad(jnp.concatenate(met, axis=1), back)
    return _product(x, jnp.concatenate(_taps(g, side, (1, 1)), axis=-1))

  total = tiles.sum_rows(row, x_BxHxWxC.shape[1]).reshape(-1, *side, d)
  return total[:, ::-1, ::-1].transpose(1, 2, 0, 3)


def _product(x_NxC, g_NxD):
  """x^T g, summed over all axes but the last, in float32 at least.

  A product of matrices: to sum over several axes, XLA's CPU compiler copies x to transpose it.
  """
  dtype = tiles.summed_in(x_NxC)
  x_NxC, g_NxD = (v.reshape(-1, v.shape[-1]) for v in (x_NxC, g_NxD))
  return lax.dot_general(x_NxC, g_NxD, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


def resize(x_BxHxWxC: jax.Array, shape: Pair) -> jax.Array:
  """`jax.image.resize` of maps, "linear" with antialiasing, to another height and width.

  A product for each image and each row, in place of products over the whole batch, for which
  XLA's CPU compiler transposes the maps: three times faster, gradients too.
  """
  (b, h, w, c), (i, j) = x_BxHxWxC.shape, shape

  def weights(n, m):
    return jax.image.resize(jnp.eye(n, dtype=x_BxHxWxC.dtype), (m, n), "linear", antialias=True)

  def each(matrix_MxN, x_AxNxK):
    matrices = jnp.broadcast_to(matrix_MxN, (len(x_AxNxK), *matrix_MxN.shape))
    return lax.batch_matmul(matrices, x_AxNxK)

  x_BxIxWC = each(weights(h, i), x_BxHxWxC.reshape(b, h, -1))
  return each(weights(w, j), x_BxIxWC.reshape(b * i, w, c)).reshape(b, i, j, c)


def along_last(x: jax.Array, kernel_CxD: jax.Array) -> jax.Array:
  """The product x W over the last axis of maps (B, H, W, C), tokens (S, B, C), features (B, C).

  A product of matrices, so that the gradient of W is one too: to sum over several axes, XLA's CPU
  compiler copies its operands to transpose them (15 to 25 % of a Mixer's step). Tokens on several
  devices are an exception: the batch is split over them, which merging it with S would prevent.
  """
  _, devices = meshes.target()
  if x.ndim == 3 and devices > 1:
    return x @ kernel_CxD
  y_NxD = x.reshape(-1, x.shape[-1]) @ kernel_CxD
  return y_NxD.reshape(*x.shape[:-1], kernel_CxD.shape[-1])


def along_first(kernel_SxT: jax.Array, x_SxBxD: jax.Array) -> jax.Array:
  """W^T x over the first axis of x, (T, B, D); a product of matrices for the same reason."""
  x_SxN = x_SxBxD.reshape(len(x_SxBxD), -1)
  y_TxN = lax.dot_general(kernel_SxT, x_SxN, (((0,), (0,)), ((), ())))
  return y_TxN.reshape(-1, *x_SxBxD.shape[1:])


def materialize(x: jax.Array) -> jax.Array:
  """Returns x and makes XLA compute it only once.

  XLA's CPU backend would fuse a cheap sum of many terms into each operation that reads it, and
  compute it as often. It fuses nothing into a conditional, whose branches here both return x in
  ways that XLA does not see to be the same. Elsewhere it would only be in the way of fusion, and of
  sums over devices that could be one. Small arrays are left alone: they cost less than a conditional.
  """
  if not _on_cpu() or x.size < _LARGE:
    return x
  first = x[(0,) * x.ndim]
  return jax.lax.cond(first == first, lambda x: x, lambda x: jnp.where(x == x, x, jnp.nan), x)


@jax.custom_vjp
def gradient_once(x: jax.Array) -> jax.Array:
  """Returns x; its gradient is computed only once (`materialize`)."""
  return x


gradient_once.defvjp(lambda x: (x, None), lambda _, g: (materialize(g),))
