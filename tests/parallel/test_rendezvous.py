"""Rendezvous of ranks: missing ranks and a wrong address are reported in time, by one sentence."""

import os
import socket
import threading
import time

import pytest

from helpers.ranks import free_port
from megadit.errors import UserError
from megadit.parallel.environment import RankVariables
from megadit.parallel.processes import RendezvousFailed, rendezvous


def rank_variables(rank, world, port, host="127.0.0.1"):
    return RankVariables("variables", rank, world, rank, None, host, port)


def test_all_ranks_share_what_they_store():
    port, stores = free_port(), {}
    threads = [
        threading.Thread(target=lambda r=r: stores.update({r: rendezvous(rank_variables(r, 3, port), 60)}))
        for r in (2, 1, 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(stores) == [0, 1, 2]
    stores[2].set("x", "7")
    assert stores[0].get("x") == stores[1].get("x") == b"7"


def test_ranks_that_do_not_come_are_named():
    port = free_port()
    with pytest.raises(RendezvousFailed) as failed:
        rendezvous(rank_variables(0, 4, port), 0.5)
    text = str(failed.value)
    assert text.startswith("1 of 4 ranks came, and ranks 1, 2, 3 did not within 0.5 s at 127.0.0.1:")
    assert str(port) in text and "parallel.rendezvous_timeout_s" in text and "\n" not in text


def test_a_first_rank_that_does_not_come_is_named():
    begin = time.monotonic()
    with pytest.raises(RendezvousFailed, match=r"rank 1 of 2 found no rank 0 at 127.0.0.1:\d+ .* within 0.5 s"):
        rendezvous(rank_variables(1, 2, free_port()), 0.5)
    assert time.monotonic() - begin < 30


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as other, pytest.raises(UserError, match=r"MASTER_PORT: \d+ cannot be used on"):
        rendezvous(rank_variables(0, 2, other.getsockname()[1]), 5)


def test_another_program_at_the_port_is_not_waited_for_in_vain():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RendezvousFailed, match="another program may listen there"):
            rendezvous(rank_variables(1, 2, port), 1)


def test_a_name_without_an_address_is_refused(monkeypatch):
    def unknown(*_args, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("megadit.parallel.processes._RESOLVE_S", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="MASTER_ADDR: 'nowhere' has no address"):
        rendezvous(rank_variables(1, 2, 29500, "nowhere"), 5)


def test_the_agents_store_is_used_where_torchrun_offers_one(monkeypatch):
    from torch.distributed import TCPStore

    port = free_port()
    agent = TCPStore("127.0.0.1", port, 2, True, wait_for_workers=False)
    monkeypatch.setitem(os.environ, "TORCHELASTIC_USE_AGENT_STORE", "True")
    other = threading.Thread(target=lambda: rendezvous(rank_variables(1, 2, port), 60))
    other.start()
    store = rendezvous(rank_variables(0, 2, port), 60)  # serves none of its own: the port is the agent's
    other.join(60)
    store.set("x", "1")
    assert agent.get("x") == b"1"
