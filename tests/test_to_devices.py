"""The rows of a batch that a process gives to its devices."""

import jax
import numpy as np
import pytest
from models import mesh_of

from mtp_jax.errors import UserError
from mtp_jax.parallel import to_devices


class PartOfSharding:
    """The sharding as a process that has only some of the devices sees it."""

    def __init__(self, sharding, devices):
        self.sharding = sharding
        self.devices = devices

    def addressable_devices_indices_map(self, shape):
        places = self.sharding.devices_indices_map(shape)
        return {device: places[device] for device in self.devices}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_rows_of_a_process_are_those_its_devices_hold(accumulation):
    count = jax.device_count()
    shape = (1, count, 1) if count % 2 else (2, count // 2, 1)
    mesh = mesh_of(*shape)
    spec = jax.sharding.PartitionSpec(None, ("replica", "fsdp"), None)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    batch_size = accumulation * count * 2

    found = to_devices.rows_of_process(sharding, batch_size, accumulation)
    assert found.tolist() == list(range(batch_size))

    numbers = np.arange(batch_size).reshape(accumulation, -1)
    half = mesh.devices.ravel()[: max(1, count // 2)]
    found = to_devices.rows_of_process(
        PartOfSharding(sharding, half), batch_size, accumulation
    )
    assert found.tolist() == sorted(numbers[:, : 2 * len(half)].ravel().tolist())


def test_rows_that_several_devices_hold_are_given_once():
    mesh = jax.make_mesh((jax.device_count(),), ("tensor",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    assert to_devices.rows_of_process(sharding, 4, 2).tolist() == [0, 1, 2, 3]


@pytest.mark.skipif("jax.device_count() == 1", reason="needs several devices")
def test_a_batch_that_does_not_split_over_the_devices_is_refused():
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
    spec = jax.sharding.PartitionSpec(None, "fsdp", None)

    with pytest.raises(UserError, match="= 3 rows do not split"):
        to_devices.rows_of_process(jax.sharding.NamedSharding(mesh, spec), 6, 2)
