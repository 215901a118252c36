"""Each GPU with the network card that is its own, and whether GPUDirect RDMA is used between the two."""

from parallel.network.facts import Facts
from parallel.network.findings import Rail, Verdict
from parallel.network.nccl_variables import DEFAULT_LEVEL
from parallel.network.nics import Port
from parallel.network.registration import can_register, too_little_locked_memory
from parallel.network.topology import DISTANCES


def find_rails(facts: Facts) -> tuple[Rail, ...]:
    """The verdict on each GPU, in order of their indices."""
    if facts.topology is None:
        reason = "how far the network cards are is not known"
        return tuple(Rail(gpu.index, None, None, None, "unknown", reason) for gpu in facts.gpus or ())
    return tuple(_judge(facts, gpu, nic) for gpu, nic in own_nics(facts).items())


def own_nics(facts: Facts) -> dict[int, str | None]:
    """The card of each GPU: the nearest; among equally near ones those that NCCL's log shows, then shared out evenly.

    A card of another network (Ethernet beside InfiniBand, or a link that is up at less than half the fastest rate) is
    taken only where none of the fabric is as near.
    """
    assert facts.topology is not None
    topology, uses = facts.topology, dict.fromkeys(facts.topology.nics, 0)
    own: dict[int, str | None] = {}
    for gpu in sorted(topology.gpus):
        logged = facts.log.devices_of(gpu) if facts.log else frozenset()

        def order(nic: str, gpu: int = gpu, logged: frozenset[str] = logged) -> tuple[float, ...]:
            return (
                DISTANCES.index(topology.distances[gpu, nic]),
                _of_another_network(facts, nic),
                nic not in logged,
                uses[nic],
                not _usable(facts, nic),
                topology.nics.index(nic),
            )

        own[gpu] = min(topology.nics, key=order, default=None)
        if own[gpu] is not None:
            uses[own[gpu]] += 1  # type: ignore[index]
    return own


def fabric_ports(facts: Facts) -> dict[str, Port]:
    """Ports that carry the GPUs' traffic: those of cards that are some GPU's own."""
    if facts.topology is None or not facts.ports:
        return {}
    own = own_nics(facts).values()
    return {name: port for name, port in facts.ports.items() if name in own}


def _judge(facts: Facts, gpu: int, nic: str | None) -> Rail:
    assert facts.topology is not None
    if nic is None:
        if facts.ports == {}:
            return Rail(gpu, None, None, None, "no", "there is no RDMA network card")
        return Rail(gpu, None, None, None, "unknown", "nvidia-smi topo -m shows no network card")
    distance = facts.topology.distances[gpu, nic]
    port = (facts.ports or {}).get(nic)
    blockers, unknowns = _obstacles(facts, gpu, nic, distance)
    verdict, reason = _logged(facts, gpu, nic)
    proven = verdict is not None
    if verdict == "no" and blockers:
        reason = f"{blockers[0]}; {reason}"
    if verdict is None:
        verdict, reason = _concluded(facts, nic, blockers, unknowns)
    return Rail(gpu, nic, distance, str(port) if port else None, verdict, reason, proven)


def _logged(facts: Facts, gpu: int, nic: str) -> tuple[Verdict | None, str]:
    """The verdict of NCCL's log, None where it shows no connection of the pair."""
    connections = facts.log.between(gpu, nic) if facts.log else ()
    if not connections:
        return None, ""
    direct = [connection for connection in connections if connection.direct]
    count = f"{len(connections)} connection{'s' * (len(connections) > 1)}"
    if len(direct) == len(connections):
        return "yes", f"NCCL's log: {count}, all direct"
    if not direct:
        return "no", f"NCCL's log: {count}, all staged through the host"
    staged = {"sends" if connection.sends else "receives" for connection in connections if not connection.direct}
    return (
        "partly",
        f"NCCL's log: {count}, {len(direct)} direct; {' and '.join(sorted(staged))} staged through the host",
    )


def _concluded(facts: Facts, nic: str, blockers: list[str], unknowns: list[str]) -> tuple[Verdict, str]:
    if blockers:
        return "no", "; ".join(blockers)
    if unknowns:
        return "unknown", "; ".join(unknowns)
    if facts.settings is not None and facts.settings.read is False:
        return "partly", "NCCL_NET_GDR_READ=0: what the GPU sends is staged through the host"
    return "yes", f"near enough, link up, {can_register(facts, nic)[1]}"


def _obstacles(facts: Facts, gpu: int, nic: str, distance: str) -> tuple[list[str], list[str]]:
    """What prevents GPUDirect RDMA between the two, and what would have to be known."""
    blockers, unknowns = [], []
    port, settings = (facts.ports or {}).get(nic), facts.settings
    if settings is None:
        unknowns.append("which NCCL variables are set is not known")
    else:
        if settings.rdma_off:
            blockers.append(f"{settings.rdma_off} turns RDMA off")
        if settings.plugin:
            unknowns.append(f"{settings.plugin}: a plugin decides, and only NCCL's log tells")
        if not settings.uses_device(nic, port.number if port else 1):
            blockers.append(f"NCCL_IB_HCA={settings.variables['NCCL_IB_HCA']} leaves {nic} out")
    if port is None:
        unknowns.append(f"the state of {nic}'s link is not known")
    elif not port.active:
        blockers.append(f"{nic}'s link is {port.state.lower()}")
    if nic.startswith(("efa", "rdmap")):
        unknowns.append("an Elastic Fabric Adapter works through a plugin, and only NCCL's log tells")
    _judge_distance(facts, distance, blockers, unknowns)
    if facts.log is not None and facts.log.network == "Socket":
        blockers.append("NCCL's log: it chose TCP sockets")
    if any(each.index == gpu and "GeForce" in each.name for each in facts.gpus or ()):
        blockers.append("GeForce cards do not offer GPUDirect RDMA")
    if facts.gpus is None:
        unknowns.append("what kind of GPU it is is not known")
    possible, why = can_register(facts, nic)
    if possible is None:
        unknowns.append(why)
    elif not possible:
        blockers.append(why)
    if too_little_locked_memory(facts) is None:
        unknowns.append("the limit on locked memory is not known")
    elif too_little_locked_memory(facts):
        blockers.append("the limit on locked memory is too low for NCCL to start")
    return blockers, unknowns


def _judge_distance(facts: Facts, distance: str, blockers: list[str], unknowns: list[str]) -> None:
    if facts.settings is None or facts.settings.near_enough(distance):
        return
    if "NCCL_TOPO_FILE" in facts.settings.variables:
        unknowns.append(f"NCCL_TOPO_FILE may place it nearer than the {distance} that nvidia-smi sees")
        return
    if any(word in gpu.name for gpu in facts.gpus or () for word in ("GH200", "GB200", "GB300")):
        unknowns.append(f"with a Grace CPU, NCCL 2.27 and later may use it at {distance} too, and only its log tells")
        return
    level = facts.settings.level or DEFAULT_LEVEL
    blockers.append(f"{distance} is farther than NCCL's limit {level}")


def _of_another_network(facts: Facts, nic: str) -> bool:
    ports = facts.ports or {}
    if nic not in ports:
        return False
    fastest = max((port.rate for port in ports.values() if port.active), default=0.0)
    beside_infiniband = ports[nic].link_layer == "Ethernet" and any(
        port.link_layer == "InfiniBand" for port in ports.values()
    )
    return beside_infiniband or (ports[nic].active and 2 * ports[nic].rate < fastest)


def _usable(facts: Facts, nic: str) -> bool:
    port = (facts.ports or {}).get(nic)
    return port is not None and port.active and (facts.settings is None or facts.settings.uses_device(nic, port.number))
