"""Storms: clients that ask until they are answered, while servers, replicas and Redis are killed under them."""

import random
import time

import pytest
from live import MakeServer
from redis_server import RedisServer
from storm import Storm

pytestmark = pytest.mark.slow

ROUNDS = 3
"""at least, however short the storm is"""


def test_kills_under_64_clients_lose_and_double_nothing(fresh: MakeServer, seed: int, storm_s: float) -> None:
    rng = random.Random(seed)
    one = fresh().start()
    with Storm("kills", [one], seed) as storm:
        while blows(storm, storm_s):
            time.sleep(rng.uniform(0.3, 1.5))
            if storm.count["rounds"] % 4 == 3:
                assert one.terminate() == 0
                one.start()
                storm.count.update(rounds=1, stops=1)
            else:
                one.restart()
                storm.count.update(rounds=1, kills=1)
    counted = storm.check(one)
    assert counted["cuts"] and counted["replays"]


def test_two_replicas_on_one_redis_killed_in_turn_lose_and_double_nothing(
    fresh: MakeServer, redis: RedisServer, seed: int, storm_s: float
) -> None:
    rng = random.Random(seed)
    replicas = [fresh(store=redis.url).start() for _ in range(2)]
    with Storm("replicas", replicas, seed) as storm:
        while blows(storm, storm_s):
            time.sleep(rng.uniform(0.3, 1.5))
            rng.choice(replicas).restart()
            storm.count.update(rounds=1, kills=1)
    storm.check(*replicas)


def test_a_redis_that_is_killed_and_comes_back_loses_nothing(
    fresh: MakeServer, redis: RedisServer, seed: int, storm_s: float
) -> None:
    rng = random.Random(seed)
    replicas = [fresh(store=redis.url).start() for _ in range(2)]
    with Storm("redis", replicas, seed) as storm:
        while blows(storm, storm_s):
            time.sleep(rng.uniform(0.3, 1.5))
            redis.kill()
            time.sleep(rng.uniform(0, 0.5))
            redis.start()
            storm.count.update(rounds=1, kills=1)
    storm.check(*replicas)


def test_what_redis_lost_at_a_power_failure_is_told_once(
    fresh: MakeServer, redis: RedisServer, seed: int, storm_s: float
) -> None:
    rng = random.Random(seed)
    redis.append_only = "everysec"
    redis.options = (*redis.options, "auto-aof-rewrite-percentage 0")  # the file whose end is cut off is one
    redis.restart()
    one = fresh(store=redis.url).start()
    with Storm("power", [one], seed, clients=16, alone=True) as storm:
        while blows(storm, storm_s):
            time.sleep(rng.uniform(0.5, 1.5))
            lose_power(redis, rng.uniform(0.05, 1))
            storm.count.update(rounds=1, kills=1)
        time.sleep(1)
    counted = storm.check(one)
    assert counted["rolled_back_entries"] > 0
    assert counted["rolled_back_sessions"] <= counted["rounds"] * len(storm.clients)


def blows(storm: Storm, seconds: float) -> bool:
    """Whether the storm goes on."""
    assert any(client.is_alive() for client in storm.clients), [client.failure for client in storm.clients]
    return storm.seconds < seconds or storm.count["rounds"] < ROUNDS


def lose_power(redis: RedisServer, unwritten_s: float) -> None:
    """Kill Redis, and take from its file what it wrote in the last moments: that was not on the disk yet."""
    file = redis.append_only_file()
    written = file.stat().st_size
    time.sleep(unwritten_s)
    redis.kill()
    with file.open("r+b") as opened:
        opened.truncate(written)
    redis.start()
