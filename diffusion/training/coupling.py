"""Which noise goes with which example of a batch: pairs by optimal transport, for straighter flows.

Flow matching draws noise and data independently, so lines from one to the other cross and the
flow, their mean, is bent. Pairing a batch by the permutation that moves least,

    p = argmin_p sum_i |x_i - eps_p(i)|^2 = argmax_p sum_i <x_i, eps_p(i)>,                     (1)

keeps both marginals and uncrosses the lines (OT-CFM, https://arxiv.org/abs/2302.00482, section
3.2.3; https://arxiv.org/abs/2304.14772). The authors' code (atong01/conditional-flow-matching:
torchcfm/optimal_transport.py) draws as many pairs from the plan, with replacement; here each
example is taken once.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from diffusion.models import target


def optimal(
    x0: Float[Array, "batch *shape"], noise: Float[Array, "batch *shape"]
) -> Float[Array, "batch *shape"]:
    """The noise in the order of eq. 1: row i is for example i. Of the whole batch, exact; O(n^3).

    Under a mesh every device finds the same permutation, of products that are gathered once.
    """
    x, eps = (a.reshape(len(a), -1).astype(jnp.float32) for a in (x0, noise))
    # A batch that is not finite is skipped by the step; here it must not search for ever.
    cost = jnp.nan_to_num(-jnp.matmul(x, eps.T, precision="highest"))
    if (mesh := target.current().mesh) is not None:
        cost = jax.lax.with_sharding_constraint(cost, NamedSharding(mesh, PartitionSpec()))
    rows, columns = optax.assignment.hungarian_algorithm(jax.lax.stop_gradient(cost))
    return noise[columns[jnp.argsort(rows)]]
