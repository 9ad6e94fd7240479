"""The mutants: what each leaves out, what that must break, its patch, and the cheapest tests that see it.

A patch is text of an exported module, there exactly once, and what stands there instead.
"""

from dataclasses import dataclass

LOG, STORES, BUS = "tests/contracts/test_log.py", "tests/contracts/test_stores.py", "tests/contracts/test_bus.py"
WORKER, ANSWERS, INTAKE = (f"tests/contracts/test_{name}.py" for name in ("worker", "answers", "intake"))
VERIFY, SETBACKS = "tests/contracts/test_verify.py", "tests/contracts/test_setbacks.py"
PRUNE = "tests/contracts/test_prune.py"
VERSIONS, ADMISSION = "tests/contracts/test_versions.py", "tests/contracts/test_admission.py"
LEDGER, ROLES = "tests/contracts/test_ledger.py", "tests/contracts/test_roles.py"
BUNDLE, FOLD, TILES = (
    "tests/decision/test_bundle.py",
    "tests/parity/test_fold_oracle.py",
    "tests/parity/test_tiles_oracle.py",
)

WIPE = """\
            cursor = -1
            while cursor != 0:
                failpoint("wiping")
                cursor, keys = self._redis.scan(max(cursor, 0), profile_key(partition, "*"), SCAN_BATCH)
                if keys:  # as long as no watermark vouches for them
                    self._change({partition: None}, partial(_unlink, keys))
"""


@dataclass(frozen=True)
class Mutant:
    """The package without one of its safety mechanisms."""

    title: str  # what it does otherwise
    breaks: str  # what comes of that
    file: str  # in fraud_nb/
    old: str
    new: str
    tests: tuple[str, ...]  # pytest's selection
    harmless: str = ""  # why nothing comes of it


def mutant(title: str, breaks: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """One that does harm."""
    return Mutant(title, breaks, file, old, new, tests)


def harmless(title: str, why: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """One that does none."""
    return Mutant(title, "nothing", file, old, new, tests, why)


THE_LOG = (
    mutant(
        "a commit does not ask for the epoch",
        "a zombie commits beside the worker that took over",
        "adapters/postgres.py",
        "WHERE partition = %s AND epoch = %s AND next_offset = %s",
        "WHERE partition = %s AND epoch >= %s AND next_offset = %s",
        f"{LOG}::test_a_claim_fences_the_one_before",
    ),
    mutant(
        "a claim leaves the epoch as it is",
        "the one before is not fenced",
        "adapters/postgres.py",
        '"UPDATE progress SET epoch = epoch + 1 WHERE partition = ANY(%s) "',
        '"UPDATE progress SET epoch = epoch WHERE partition = ANY(%s) "',
        f"{LOG}::test_a_claim_fences_the_one_before",
    ),
    mutant(
        "a commit does not ask where the log stands",
        "progress goes back, and records are decided again",
        "adapters/postgres.py",
        "WHERE partition = %s AND epoch = %s AND next_offset = %s",
        "WHERE partition = %s AND epoch = %s AND %s >= 0",
        f"{LOG}::test_nobody_commits_from_a_place_that_is_behind",
    ),
    mutant(
        "a fenced commit goes through without progress",
        "rows of a zombie are in the log",
        "adapters/postgres.py",
        '    if cursor.rowcount != 1:\n        raise Fenced(f"partition {partition}: another worker has claimed it")\n',
        "",
        f"{LOG}::test_a_claim_fences_the_one_before",
    ),
    mutant(
        "an id that the log knows is decided again",
        "the log refuses the batch, and the worker never gets over it",
        "pipeline/stream.py",
        "seen, arrivals, repeats = dict(known), list[Arrival](), list[Repeat]()",
        "seen, arrivals, repeats = dict[str, tuple[bytes, bool]](), list[Arrival](), list[Repeat]()",
        f"{ADMISSION}::test_an_id_is_learned_once",
    ),
    mutant(
        "an id that comes twice in one batch is decided twice",
        "the log refuses the batch, and the worker never gets over it",
        "pipeline/stream.py",
        "            seen[transaction.transaction_id] = digest, False\n",
        "",
        f"{ADMISSION}::test_an_id_is_learned_once",
    ),
    mutant(
        "a conflict is taken for a repeat",
        "nobody learns that a shop gives one id to two purchases",
        "pipeline/stream.py",
        "transaction.transaction_id, first == digest))",
        "transaction.transaction_id, True))",
        f"{ADMISSION}::test_an_id_is_learned_once",
    ),
    mutant(
        "another purchase takes the place of one that was asked about",
        "what is learned is not what was decided",
        "pipeline/stream.py",
        "if first is None or (waits and first == digest):",
        "if first is None or waits:",
        f"{ADMISSION}::test_an_id_is_learned_once",
    ),
    mutant(
        "what was decided over HTTP is decided again by the worker",
        "two decisions about one purchase",
        "pipeline/stream.py",
        "fresh = [index for index, arrival in enumerate(arrivals) if not arrival.is_decided]",
        "fresh = list(range(len(arrivals)))",
        f"{ANSWERS}::test_what_was_asked_is_placed_and_learned_once",
    ),
    mutant(
        "the database lets a decision move to another place",
        "a decision made over HTTP is learned twice",
        "adapters/postgres.py",
        'FOR EACH ROW WHEN (OLD."offset" IS NOT NULL) EXECUTE',
        'FOR EACH ROW WHEN (OLD."offset" < 0) EXECUTE',
        f"{LOG}::test_a_decision_gets_its_place_once",
    ),
    mutant(
        "the worker does not see that somebody else placed a decision",
        "a decision made over HTTP is learned twice",
        "adapters/postgres.py",
        "                    if cursor.rowcount != 1:\n                        raise AlreadyDecided("
        '"transaction_id: another record has given the decision its offset")\n',
        "",
        f"{LOG}::test_a_decision_gets_its_place_once",
    ),
    mutant(
        "a place is given without a look at whether there is one",
        "a worker that comes second ends, instead of looking again",
        "adapters/postgres.py",
        'WHERE transaction_id = %s AND partition = %s AND "offset" IS NULL',
        "WHERE transaction_id = %s AND partition = %s",
        f"{LOG}::test_a_decision_gets_its_place_once",
    ),
    mutant(
        "the worker's role may rewrite decisions",
        "the log is no evidence",
        "adapters/postgres.py",
        'GRANT UPDATE ("offset") ON decisions TO fraud_writer',
        "GRANT UPDATE ON decisions TO fraud_writer",
        f"{ROLES}::test_each_role_has_the_rights_of_its_work_and_no_other[fraud_writer]",
    ),
    mutant(
        "a worker starts on a schema that is not its own",
        "it writes what the other version takes for something else",
        "adapters/postgres.py",
        "if (version := cursor.fetchone()[0]) != len(MIGRATIONS):",
        "if (version := cursor.fetchone()[0]) is None:",
        f"{LOG}::test_another_schema_is_refused",
    ),
    mutant(
        "history goes in under live transactions",
        "decisions were made without a past that the log now has",
        "adapters/postgres.py",
        "                    if next_offset > 0:\n",
        "                    if next_offset < 0:\n",
        f"{LOG}::test_history_goes_in_first_and_fences_whoever_claimed_before",
    ),
    mutant(
        "history does not fence the workers",
        "one that saw an empty past decides without it",
        "adapters/postgres.py",
        '"UPDATE progress SET epoch = epoch + 1 RETURNING partition, next_offset"',
        '"UPDATE progress SET epoch = epoch RETURNING partition, next_offset"',
        f"{LOG}::test_history_goes_in_first_and_fences_whoever_claimed_before",
    ),
    mutant(
        "one row that cannot be stored takes its half of the batch with it",
        "good purchases have no decision",
        "pipeline/stream.py",
        "        decide_records(worker, records[middle:])\n",
        "",
        f"{SETBACKS}::test_a_row_that_the_log_refuses_is_a_dead_letter_and_the_others_are_decided",
    ),
    mutant(
        "profiles keep what a refused batch taught them",
        "purchases count twice",
        "pipeline/stream.py",
        "        worker.profiles = Profiles()  # they have learned what was not committed\n",
        "",
        f"{SETBACKS}::test_a_row_that_the_log_refuses_is_a_dead_letter_and_the_others_are_decided",
    ),
    mutant(
        "nobody looks at the clock while PostgreSQL is silent",
        "a worker waits for ever",
        "adapters/postgres.py",
        "wire.shutdown(socket.SHUT_RDWR)",
        "wire.fileno()",
        f"{SETBACKS}::test_nobody_waits_for_a_silent_server",
    ),
    mutant(
        "a client that sleeps in a transaction keeps its locks",
        "whoever takes over waits for a zombie",
        "adapters/postgres.py",
        "idle_in_transaction_session_timeout=10s",
        "idle_in_transaction_session_timeout=0",
        f"{SETBACKS}::test_a_sleeping_client_keeps_no_lock_for_long",
    ),
)

THE_STORE = (
    mutant(
        "Redis takes profiles whatever the watermark is",
        "a zombie overwrites profiles",
        "adapters/redis_store.py",
        "                self._check(expected, pipe.mget(keys))\n                pipe.multi()",
        "                pipe.multi()",
        f"{STORES}::test_unexpected_watermark_changes_nothing",
    ),
    mutant(
        "the watermark may move between look and write",
        "a zombie overwrites profiles, if it is quick",
        "adapters/redis_store.py",
        "                pipe.watch(*keys)\n",
        '                pipe.watch(b"another key")\n',
        f"{STORES}::test_change_between_watch_and_exec_is_fenced",
    ),
    mutant(
        "profiles are written without a watermark",
        "nothing says how far they are",
        "adapters/ports.py",
        "    if stray:\n",
        "    if not watermarks and stray:\n",
        f"{STORES}::test_profile_without_watermark_is_refused[memory]",
    ),
    mutant(
        "the watermark is wiped last",
        "half a wipe is believed: customers lose their past",
        "adapters/redis_store.py",
        "            self._redis.delete(offset_key(partition))\n" + WIPE,
        WIPE + "            self._redis.delete(offset_key(partition))\n",
        f"{STORES}::test_half_a_wipe_is_never_believed",
    ),
    mutant(
        "who slept in the middle of a wipe goes on",
        "profiles that a successor has built are gone, and its watermark vouches for them",
        "adapters/redis_store.py",
        "                    self._change({partition: None}, partial(_unlink, keys))\n",
        "                    self._redis.unlink(*keys)\n",
        f"{STORES}::test_who_slept_in_the_middle_of_a_wipe_does_not_go_on",
    ),
    mutant(
        "a server that may evict profiles will do",
        "customers lose their past, one by one",
        "adapters/redis_store.py",
        'if policy not in (None, "noeviction"):',
        'if policy == "unknown":',
        f"{STORES}::test_evicting_server_is_refused",
    ),
    mutant(
        "nobody looks at the clock while Redis is silent",
        "a worker waits for ever",
        "adapters/redis_store.py",
        "url, socket_timeout=timeout_s, socket_connect_timeout",
        "url, socket_timeout=None, socket_connect_timeout",
        f"{STORES}::test_silent_server_is_given_up",
    ),
    mutant(
        "profiles are read whatever the watermark is",
        "whoever was a customer a moment ago is a new one",
        "pipeline/stream.py",
        "        if found != watermark:\n"
        '            raise Fenced(f"the watermark of partition {partition} is not the expected one")\n'
        "        profiles.slots(missing)",
        "        profiles.slots(missing)",
        f"{STORES}::test_an_emptied_store_is_not_a_store_of_strangers[memory]",
    ),
    mutant(
        "everybody is forgotten in the middle of a batch",
        "the customers of the partition before are strangers",
        "pipeline/stream.py",
        "        recall(worker.store, worker.profiles, partition, worker.claims[partition].next_offset, mine)\n",
        "        make_room(worker.profiles, worker.room)\n"
        "        recall(worker.store, worker.profiles, partition, worker.claims[partition].next_offset, mine)\n",
        f"{WORKER}::test_a_worker_without_room_decides_the_same",
    ),
    mutant(
        "profiles that cannot be read are left where they are",
        "the worker begins again and again",
        "pipeline/stream.py",
        '            store.wipe(partition)\n            raise Fenced(f"profiles',
        '            raise Fenced(f"profiles',
        f"{STORES}::test_profiles_of_another_codec_are_rebuilt",
    ),
    mutant(
        "profiles of any codec are read",
        "bytes of another day are taken for events",
        "features/profile.py",
        "    if any(each[:1] != _VERSION for each in stored):\n",
        "    if any(not each for each in stored):\n",
        f"{STORES}::test_profiles_of_another_codec_are_rebuilt",
    ),
    mutant(
        "profiles that were cut short end the worker",
        "it cannot begin again, as it meets them again",
        "features/profile.py",
        "    if (sizes % dtype.itemsize).any():\n",
        "    if (sizes < 0).any():\n",
        f"{STORES}::test_profiles_of_another_codec_are_rebuilt",
    ),
    mutant(
        "a store that is ahead of the log is believed",
        "purchases that the log has forgotten count",
        "pipeline/stream.py",
        "if not watermark or watermark > logged:",
        "if not watermark:",
        f"{SETBACKS}::test_a_log_that_was_set_back_decides_again_and_tells_nobody_twice",
    ),
    mutant(
        "a store that is behind the log is not brought up to it",
        "purchases are missing in profiles",
        "pipeline/stream.py",
        "    if watermark == logged > 0:\n",
        "    if watermark is not None and logged > 0:\n",
        f"{WORKER}::test_a_store_that_is_behind_is_brought_up_to_the_log",
    ),
    mutant(
        "an empty store at an empty log is taken for up to date",
        "history that was put under the log is missing in profiles",
        "pipeline/stream.py",
        "    if watermark == logged > 0:\n",
        "    if watermark == logged:\n",
        f"{WORKER}::test_history_put_under_an_idle_worker_is_learned",
    ),
    mutant(
        "an idle worker does not look after its profiles",
        "the service answers from an emptied store until somebody buys",
        "pipeline/stream.py",
        "        if not records:\n            look_after(worker)\n",
        "",
        f"{SETBACKS}::test_a_store_that_lost_its_content_is_noticed_though_nothing_comes",
    ),
    mutant(
        "after an error the worker goes on where it was",
        "it never claims again, and never gets over the error",
        "pipeline/stream.py",
        "        worker.generation = None\n        worker.counts.restarts += 1\n",
        "        worker.counts.restarts += 1\n",
        f"{WORKER}::test_what_is_committed_is_told_once_and_never_decided_again",
    ),
    mutant(
        "the store is written before the log",
        "a row that cannot be stored stops the partition: the store is ahead whenever the log refuses",
        "pipeline/stream.py",
        "    worker.log.commit(Batch(decided, letters_of(refused), repeats, advance, places))\n",
        "    worker.store.save(\n"
        "        {partition: (before[partition].next_offset, offset) for partition, offset in following.items()},\n"
        "        {(partition, name): worker.profiles.dump(name) for name, partition in home.items()},\n"
        "    )\n"
        "    worker.log.commit(Batch(decided, letters_of(refused), repeats, advance, places))\n"
        "    before = {p: Claim(claim.epoch, following[p]) for p, claim in before.items()}\n",
        f"{SETBACKS}::test_a_row_that_the_log_refuses_is_a_dead_letter_and_the_others_are_decided",
    ),
)

THE_BUS = (
    mutant(
        "offsets are committed in nobody's name",
        "a zombie publishes beside the worker that took over",
        "adapters/kafka_bus.py",
        "producer.send_offsets_to_transaction(offsets, identity)",
        'producer.send_offsets_to_transaction(offsets, identity._replace(generation_id=-1, member_id=""))',
        f"{BUS}::test_expelled_member_is_fenced_and_begins_again[kafka]",
    ),
    mutant(
        "the sink does not ask for the generation",
        "what was decided before a rebalance is published after it",
        "adapters/kafka_bus.py",
        "if identity is None or now != generation or not partitions",
        "if identity is None or now < generation or not partitions",
        f"{BUS}::test_expelled_member_is_fenced_and_begins_again[kafka]",
    ),
    mutant(
        "offsets of partitions that are not ours are published",
        "records of another worker are skipped",
        "adapters/kafka_bus.py",
        "or now != generation or not partitions >= set(next_offsets):",
        "or now != generation:",
        f"{BUS}::test_foreign_partition_is_refused[kafka]",
    ),
    mutant(
        "who was fenced keeps the name",
        "two with one transactional id fence each other without end",
        "adapters/kafka_bus.py",
        '            self._transactional_id = f"{self._source.group}:{self._draw()}"\n',
        "            pass\n",
        f"{BUS}::test_who_is_fenced_begins_again_under_another_name",
    ),
    mutant(
        "what a dead worker left open stays open",
        "its successor is not told the group's offsets, and decides nothing for up to half a minute",
        "adapters/kafka_bus.py",
        '                end_long_open(self._settings["bootstrap_servers"], self.group)\n',
        "                pass\n",
        f"{BUS}::test_what_a_dead_member_left_open_is_ended_by_its_successor",
    ),
    mutant(
        "verify does not wait for a transaction that is open",
        "predictions that are there are reported as missing",
        "apps/parts.py",
        "        await_settled(found.kafka, topic, report, deadline_s)\n",
        "        pass\n",
        f"{BUS}::test_verification_waits_for_what_a_killed_worker_left_open",
    ),
    mutant(
        "a publish without an answer is simply followed by the next",
        "what did get through is published twice",
        "adapters/kafka_bus.py",
        "        self._unsettled = not is_fenced\n",
        "        self._unsettled = False\n",
        f"{BUS}::test_a_publish_without_an_answer_is_settled_before_the_next",
    ),
    mutant(
        "a publish that hangs is taken for done",
        "predictions are lost",
        "adapters/kafka_bus.py",
        "    if thread.is_alive():\n",
        "    if thread is threading.current_thread():\n",
        f"{BUS}::test_an_answer_that_does_not_come_in_time_is_no_answer",
    ),
    mutant(
        "records and offsets are published without one another",
        "predictions are lost or doubled when the worker dies in between",
        "adapters/kafka_bus.py",
        "        if offsets:\n            producer.send_offsets_to_transaction",
        "        if offsets and not records:\n            producer.send_offsets_to_transaction",
        f"{BUS}::test_published_with_offsets[kafka]",
    ),
    mutant(
        "verify reads what was never committed",
        "a prediction that no reader sees counts as published",
        "adapters/kafka_bus.py",
        'isolation_level=isolation, auto_offset_reset="earliest"',
        'isolation_level="read_uncommitted", auto_offset_reset="earliest"',
        f"{BUS}::test_what_was_aborted_is_read_by_nobody",
    ),
    mutant(
        "the worker reads what was never committed",
        "purchases that a shop took back are decided",
        "adapters/kafka_bus.py",
        '"isolation_level": "read_committed"',
        '"isolation_level": "read_uncommitted"',
        f"{BUS}::test_what_was_aborted_is_read_by_nobody",
    ),
    mutant(
        "an offset that is gone is replaced by the first that is left",
        "records vanish, and nobody learns of it",
        "adapters/kafka_bus.py",
        '"auto_offset_reset": "none"',
        '"auto_offset_reset": "earliest"',
        f"{BUS}::test_retention_overtakes_a_reader[kafka]",
    ),
    mutant(
        "records come before anybody has claimed their partition",
        "they are decided without a claim",
        "adapters/kafka_bus.py",
        "            self.consumer.pause(partition)\n",
        "",
        f"{BUS}::test_nothing_before_seek[kafka]",
    ),
    mutant(
        "a consumer that brings nothing is kept",
        "the worker stands still until somebody restarts it",
        "adapters/kafka_bus.py",
        "            self.rejoin()\n            raise BusUnavailable(",
        "            str(\n",
        f"{SETBACKS}::test_a_consumer_that_brings_nothing_is_exchanged",
    ),
    mutant(
        "a topic with another number of partitions will do",
        "customers change partitions, and lose their past",
        "adapters/kafka_bus.py",
        "        if found[topic] != wanted[topic]:\n",
        "        if found[topic] < 1:\n",
        f"{BUS}::test_topics_are_made_once",
    ),
    mutant(
        "what is committed and not published is not published again",
        "predictions are lost",
        "pipeline/stream.py",
        "            publish_again(worker, behind)\n",
        "            worker.sink.publish([], next_offsets(behind), worker.source.generation())\n",
        f"{WORKER}::test_what_is_committed_is_told_once_and_never_decided_again",
    ),
    mutant(
        "dead letters are not published again",
        "refused records are lost",
        "pipeline/stream.py",
        "            outgoing.append(dead_letter(mine[offset], field_name, reason))\n",
        "            outgoing = list(outgoing)\n",
        f"{WORKER}::test_what_is_committed_is_told_once_and_never_decided_again",
    ),
    mutant(
        "after a claim it reads on from the log's place",
        "what is committed and not published stays so",
        "pipeline/stream.py",
        "worker.source.seek(partition, min(worker.published[partition], logged))",
        "worker.source.seek(partition, logged)",
        f"{WORKER}::test_what_is_committed_is_told_once_and_never_decided_again",
    ),
    mutant(
        "after a claim it reads on from what is published",
        "what a log that was set back has forgotten is never decided",
        "pipeline/stream.py",
        "worker.source.seek(partition, min(worker.published[partition], logged))",
        "worker.source.seek(partition, worker.published[partition])",
        f"{SETBACKS}::test_a_log_that_was_set_back_decides_again_and_tells_nobody_twice",
    ),
    mutant(
        "what is decided again is published again",
        "readers are told twice after a restore",
        "pipeline/stream.py",
        "    return record.offset >= worker.published[record.partition]",
        "    return True",
        f"{SETBACKS}::test_a_log_that_was_set_back_decides_again_and_tells_nobody_twice",
    ),
    mutant(
        "a rebalance does not make the worker claim again",
        "it goes on from profiles that another one has moved",
        "pipeline/stream.py",
        "        if worker.source.generation() != worker.generation:\n",
        "        if worker.generation is None:\n",
        f"{WORKER}::test_after_a_rebalance_it_claims_again",
    ),
    mutant(
        "records that are gone are stepped over in silence",
        "nobody learns that they were never decided",
        "adapters/postgres.py",
        '            cursor.execute("INSERT INTO gaps VALUES (%s, %s, %s)", (partition, claim.next_offset, stop))\n',
        "",
        f"{SETBACKS}::test_records_that_retention_took_are_noted_as_a_gap",
    ),
    mutant(
        "a topic that ends before our place is taken for cut off",
        "records of another topic are taken for repeats of ours",
        "pipeline/stream.py",
        "    if gap.available < gap.wanted:\n        raise gap\n",
        "",
        f"{SETBACKS}::test_a_log_that_ends_before_our_place_is_another_log",
    ),
    mutant(
        "a topic that was made anew is not told from the old one",
        "records at places that the log has are never decided",
        "adapters/postgres.py",
        "            if cursor.fetchone()[0] != topic_id:\n",
        "            if cursor.fetchone() is None:\n",
        f"{SETBACKS}::test_a_log_knows_its_topic",
    ),
    mutant(
        "a worker does not ask which topic it reads",
        "records at places that the log has are never decided",
        "apps/parts.py",
        "    log.check_topic(TRANSACTIONS, topic_id(found.kafka, TRANSACTIONS))\n",
        "",
        f"{SETBACKS}::test_no_worker_starts_on_another_topic",
    ),
)

WHO_IS_LET_IN = (
    mutant(
        "a purchase may lie in the future",
        "one wrong clock empties all windows, and runs the labels' clock ahead",
        "pipeline/stream.py",
        "            if transaction.event_time > record.timestamp_ms + FUTURE_MS:\n",
        "            if transaction.event_time > record.timestamp_ms + 10**15:\n",
        f"{ADMISSION}::test_the_future_begins_at_the_brokers_clock",
    ),
    mutant(
        "the future begins at the worker's clock",
        "who is let in depends on when, and where, the log is read",
        "pipeline/stream.py",
        "            if transaction.event_time > record.timestamp_ms + FUTURE_MS:\n",
        "            if transaction.event_time > time.time_ns() // 1_000_000 + FUTURE_MS:\n",
        f"{ADMISSION}::test_the_future_begins_at_the_brokers_clock",
    ),
    mutant(
        "a label may lie in the future",
        "it counts at once",
        "pipeline/intake.py",
        "            if label.label_time > record.timestamp_ms + FUTURE_MS:\n",
        "            if label.label_time > record.timestamp_ms + 10**15:\n",
        f"{ADMISSION}::test_the_future_begins_at_the_brokers_clock",
    ),
    mutant(
        "a customer may be in any partition",
        "their past is in two places",
        "pipeline/stream.py",
        "strangers = [pair for pair, home in zip(admitted, at_home, strict=True) if pair[0].partition != home]",
        "strangers = list[tuple[Record, Transaction]]()",
        f"{ADMISSION}::test_who_is_in_a_strangers_partition_is_refused_in_its_place",
    ),
    mutant(
        "text may hold what no store takes",
        "one NUL stops the partition",
        "domain/schema.py",
        r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,64}",
        r"[\s\S]{1,64}",
        "tests/parity/test_decode.py::test_every_refusal",
    ),
    mutant(
        "what is older than all that is remembered is learned",
        "profiles depend on the order in which purchases come",
        "features/profile.py",
        '    if event["event_time"] <= newest - HORIZON_MS:\n        return True\n',
        "",
        f"{FOLD}::test_horizon_edge",
    ),
    mutant(
        "a full profile takes nothing new",
        "who floods an account is not seen any more: it is judged by its oldest purchases",
        "features/profile.py",
        "        if place == leaving:\n",
        "        if place >= leaving:\n",
        f"{FOLD}::test_cap_of_events",
    ),
    mutant(
        "a purchase is learned before it is judged",
        "every feature counts the purchase itself",
        "features/fold.py",
        "        transform(events[index], past, told[index], out[index])\n"
        "        if learned[index] and not learn(slots[index], events[index], blocks, arena, free):\n"
        "            return index\n",
        "        if learned[index] and not learn(slots[index], events[index], blocks, arena, free):\n"
        "            return index\n"
        "        start, count = blocks[slots[index], START], blocks[slots[index], COUNT]\n"
        "        events_so_far = arena[start : start + count]\n"
        '        past = events_so_far[: events_until(events_so_far, events[index]["event_time"])]\n'
        "        transform(events[index], past, told[index], out[index])\n",
        f"{FOLD}::test_fold_equals_oracle",
    ),
)

OVER_HTTP = (
    mutant(
        "another payload under a known id gets the old answer",
        "a shop takes the decision about one purchase for that about another",
        "pipeline/predict.py",
        "    if row.payload_hash != asked:\n",
        "    if not asked:\n",
        f"{ANSWERS}::test_the_first_decision_stands_whoever_made_it",
    ),
    mutant(
        "a conflict is no 409",
        "the shop does not learn what is wrong",
        "pipeline/contract.py",
        'Problem(409, "conflict"',
        'Problem(400, "conflict"',
        "tests/service/test_door.py::test_the_same_again_and_something_else_under_the_same_id",
    ),
    mutant(
        "the answer is the service's own, whatever stands in the log",
        "two callers are told two decisions",
        "pipeline/predict.py",
        "                stands |= log.stored([row.transaction.transaction_id for row in fresh])\n",
        "                stands |= {row.transaction.transaction_id: row for row in fresh}\n",
        f"{ANSWERS}::test_the_first_decision_stands_whoever_made_it",
    ),
    mutant(
        "a past that cannot be read is an empty one",
        "everybody is a new customer while Redis is away",
        "pipeline/predict.py",
        "    if cold.any():\n        vectors[cold] = fold_blind(events[cold], known.told[cold])\n",
        "",
        f"{ANSWERS}::test_what_cannot_be_read_is_missing_and_never_zero",
    ),
    mutant(
        "what nobody has looked at is fresh",
        "an answer from an old past does not say so",
        "pipeline/predict.py",
        "        return age_ms is None or age_ms > STALE_MS\n",
        "        return age_ms is not None and age_ms > STALE_MS\n",
        f"{ANSWERS}::test_what_is_behind_says_so",
    ),
    mutant(
        "the service never says that the worker is behind",
        "an answer from an old past does not say so",
        "pipeline/predict.py",
        "        return age_ms is None or age_ms > STALE_MS\n",
        "        return age_ms is None\n",
        f"{ANSWERS}::test_what_is_behind_says_so",
    ),
    mutant(
        "what a dead service left is not handed over",
        "a purchase is decided and never learned",
        "pipeline/predict.py",
        "        if posted is None:\n            return True\n",
        "        if posted is None:\n            return False\n",
        f"{ANSWERS}::test_what_the_topic_never_got_is_handed_over_again",
    ),
    mutant(
        "advice is said to be recorded",
        "a shop relies on an answer that the log does not have",
        "pipeline/predict.py",
        "            stands, recorded = {row.transaction.transaction_id: row for row in rows}, False\n",
        "            stands, recorded = {row.transaction.transaction_id: row for row in rows}, True\n",
        f"{ANSWERS}::test_what_is_not_in_the_log_is_advice",
    ),
    mutant(
        "advice is given before the topic has the purchase",
        "nobody ever learns of it, when the topic is away too",
        "pipeline/predict.py",
        "            self.outbox.post(full, now_ms, said, to_the_end=True).result()\n",
        "            self.outbox.post(full, now_ms, said, to_the_end=True)\n",
        f"{ANSWERS}::test_what_is_not_in_the_log_is_advice",
    ),
    mutant(
        "the worker forgets the advice that was given",
        "nobody learns that a shop was told otherwise",
        "pipeline/stream.py",
        "            advice=advice_of(record),\n",
        "            advice=None,\n",
        f"{ANSWERS}::test_what_is_not_in_the_log_is_advice",
    ),
    mutant(
        "the service takes more than it can answer in time",
        "everybody waits, and nobody is answered",
        "apps/service.py",
        "        if self._queue.qsize() >= MAX_WAITING:\n            raise Overloaded\n",
        "",
        "tests/service/test_door.py::test_too_many_askers_are_sent_away",
    ),
)

LABELS_AND_SHOPS = (
    mutant(
        "a commit of labels does not ask for the epoch",
        "two number the same labels",
        "adapters/postgres.py",
        '"UPDATE label_progress SET next_offset = %s WHERE epoch = %s AND next_offset = %s"',
        '"UPDATE label_progress SET next_offset = %s WHERE epoch >= %s AND next_offset = %s"',
        f"{LOG}::test_labels_are_numbered_by_one",
    ),
    mutant(
        "a claim of labels leaves the epoch as it is",
        "the one before is not fenced",
        "adapters/postgres.py",
        '"UPDATE label_progress SET epoch = epoch + 1 RETURNING epoch, next_offset"',
        '"UPDATE label_progress SET epoch = epoch RETURNING epoch, next_offset"',
        f"{LOG}::test_labels_are_numbered_by_one",
    ),
    mutant(
        "labels that are numbered are numbered again",
        "the log refuses them, and takes no label any more",
        "pipeline/intake.py",
        "ahead = [record for record in records if record.offset >= intake.claim.next_offset]",
        "ahead = records",
        f"{INTAKE}::test_labels_are_numbered_once",
    ),
    mutant(
        "labels that a log has forgotten are not read again",
        "they are lost",
        "pipeline/intake.py",
        "intake.source.seek(0, min(intake.source.committed(0), intake.claim.next_offset))",
        "intake.source.seek(0, intake.source.committed(0))",
        f"{INTAKE}::test_labels_that_a_log_forgot_are_taken_in_again",
    ),
    mutant(
        "a label counts before its time",
        "features know what nobody knew",
        "adapters/postgres.py",
        "AND label_seq <= %(seq)s AND label_time <= %(clock)s\n            AND row",
        "AND label_seq <= %(seq)s\n            AND row",
        f"{VERSIONS}::test_a_label_counts_when_the_log_has_reached_its_time",
    ),
    mutant(
        "offline, a label counts before its time",
        "training knows what nobody will know",
        "features/shared.py",
        "seen = [[(max(label.label_time, int(clock[row])), label)",
        "seen = [[(int(clock[row]), label)",
        f"{TILES}::test_history_equals_oracle",
    ),
    mutant(
        "two close the same shared version",
        "decisions name a version that two looks have",
        "adapters/postgres.py",
        'raise Fenced(f"shared version {last.version + 1}: another worker has closed it") from None',
        "return last",
        f"{VERSIONS}::test_two_who_close_the_same_version",
    ),
    mutant(
        "tiles are read while they are built",
        "decisions are told half of what their shop has seen",
        "pipeline/sharing.py",
        "    if watermark is None or watermark <= 0:\n",
        "    if watermark is None:\n",
        f"{VERSIONS}::test_tiles_that_are_being_built_are_read_by_nobody",
    ),
    mutant(
        "tiles of a log that had come further are believed",
        "shops remember what the log has forgotten",
        "pipeline/sharing.py",
        "        sharing.store.wipe(SHARED)\n    return newest",
        "        pass\n    return newest",
        "tests/faults/test_state_machine.py::test_versions_that_the_log_has_lost_are_told_to_nobody",
    ),
    mutant(
        "tiles are moved on whoever else moves them",
        "two builders mix their tiles",
        "pipeline/sharing.py",
        '    if watermark != expected:\n        raise Fenced("shared tiles: somebody else moves them")\n',
        "",
        f"{VERSIONS}::test_a_builder_who_was_overtaken_is_fenced",
    ),
    mutant(
        "tiles that cannot be read are left where they are",
        "no version is closed any more",
        "pipeline/sharing.py",
        "        store.wipe(SHARED)\n        raise Fenced(",
        "        raise Fenced(",
        f"{VERSIONS}::test_tiles_of_another_codec_are_missing_and_then_built_anew",
    ),
)

MODELS = (
    mutant(
        "other bytes than those that were promoted are served",
        "whoever can write to the database chooses the model",
        "decision/bundle.py",
        "    if expected_sha256 is not None and sha256 != expected_sha256:\n",
        "    if expected_sha256 is not None and not sha256:\n",
        f"{BUNDLE}::test_every_mutation_is_refused",
    ),
    mutant(
        "a broken seal is no reason",
        "a damaged model is loaded",
        "decision/bundle.py",
        "    if sha256_of(body).encode() != seal:\n",
        "    if len(seal) != SEAL_BYTES:\n",
        f"{BUNDLE}::test_every_mutation_is_refused",
    ),
    mutant(
        "golden scores are not compared",
        "a model is served that scores otherwise here",
        "decision/bundle.py",
        "    if not (apart <= tolerance).all():  # NaN fails too\n",
        "    if apart.size == 0:\n",
        f"{BUNDLE}::test_another_model_under_the_old_golden_scores_is_refused",
    ),
    mutant(
        "a feature may mean something else than in training",
        "the model judges by numbers it has never seen",
        "decision/bundle.py",
        "        if fingerprint != known[name]:\n",
        "        if not fingerprint:\n",
        f"{BUNDLE}::test_a_feature_that_means_something_else_by_now_is_refused",
    ),
    mutant(
        "a model is let in unopened",
        "every worker finds out by itself that it crashes",
        "adapters/ledger.py",
        "        validate_bundle(bundle, sha256)  # takes seconds: no transaction waits for it\n",
        "",
        f"{LEDGER}::test_a_bad_bundle_leaves_nothing_behind",
    ),
    mutant(
        "a promotion that cannot be served is no matter",
        "the worker ends, instead of going on with the model it has",
        "pipeline/champion.py",
        "        except (BundleError, InvalidPolicy, NoSuchModel) as error:\n",
        "        except NoSuchModel as error:\n",
        f"{ADMISSION}::test_the_last_good_model_stays",
    ),
    mutant(
        "who starts under a broken promotion has no model",
        "a restart in the night stops all decisions, although a good model is there",
        "pipeline/champion.py",
        "            if newest is None and working is None:\n",
        "            if newest is None and working is not None:\n",
        f"{LEDGER}::test_who_starts_under_a_broken_promotion_takes_the_last_good_one",
    ),
    mutant(
        "a job is started beside itself",
        "two retrains promote against each other",
        "adapters/ledger.py",
        "            if not self._take(cursor, job):\n                return None\n",
        "",
        "tests/jobs/test_schedule.py::test_a_job_that_runs_elsewhere_is_skipped",
    ),
)

PROOF = (
    mutant(
        "verify does not compare probabilities",
        "a changed probability is not found",
        "pipeline/verify.py",
        'for stage in ("features", "probability", "outcome", "held_back", "reasons"):',
        'for stage in ("features", "outcome", "held_back", "reasons"):',
        f"{VERIFY}::test_a_changed_row",
    ),
    mutant(
        "verify compares features with themselves",
        "a changed feature is not found",
        "pipeline/verify.py",
        "            again = narrowed(vector, layout)\n",
        "            again = stored.features\n",
        f"{VERIFY}::test_a_changed_row",
    ),
    mutant(
        "verify does not look at the order of the topic",
        "predictions out of order are not found",
        "pipeline/verify.py",
        "if position == len(sources) or sources[position] != offset:",
        "if position == len(sources) or offset not in sources:",
        f"{VERIFY}::test_a_changed_topic",
    ),
    mutant(
        "verify does not count the topic",
        "predictions that are there twice are not found",
        "pipeline/verify.py",
        'return None if len(offsets) == len(sources) else Difference("topic", partition, -1)',
        "return None",
        f"{VERIFY}::test_a_changed_topic",
    ),
    mutant(
        "verify does not compare what Redis holds",
        "a changed profile is not found",
        "pipeline/verify.py",
        "folded.dump(name) if len(folded.rows(name)) else None for name in some",
        "each for each in stored",
        f"{VERIFY}::test_a_changed_state",
    ),
    mutant(
        "verify does not look at what was sent",
        "a record that nobody dealt with is not found",
        "pipeline/verify.py",
        "        elif record.offset not in noted:\n",
        "        elif record.offset < 0:\n",
        f"{VERIFY}::test_a_missing_row",
    ),
    mutant(
        "nobody counts declines",
        "a model gone wrong declines everybody",
        "decision/breaker.py",
        "too_many[place] = number >= self.most",
        "too_many[place] = False",
        "tests/decision/test_breaker.py",
    ),
    mutant(
        "declines of others are not counted",
        "each worker has a cap of its own",
        "decision/breaker.py",
        "self.declined = older | {minute: each.declined for minute, each in found.items()}",
        "self.declined = older | {minute: self.declined.get(minute, 0) for minute in found}",
        "tests/decision/test_breaker.py",
    ),
    mutant(
        "an interrupted publish is left open",
        "readers see nothing that came after it, for as long as a transaction may last",
        "adapters/kafka_bus.py",
        "        with suppress(BusUnavailable):\n            self._settle()\n",
        "",
        f"{BUS}::test_an_interrupted_publish_hides_nothing",
    ),
    mutant(
        "an idle worker does not look at its claims",
        "history that is loaded under it is not in the profiles",
        "pipeline/stream.py",
        "    worker.log.check_claims(worker.claims)",
        "    pass",
        f"{WORKER}::test_history_put_under_an_idle_worker_is_learned",
    ),
    mutant(
        "verify does not look at watermarks",
        "a store that is behind is not found",
        "pipeline/verify.py",
        "if (found or 0) != watermark or stored != [",
        "if stored != [",
        f"{VERIFY}::test_a_changed_state",
    ),
    mutant(
        "verify believes what a decision was told",
        "a changed number of a shop is not found",
        "pipeline/verify.py",
        "        wrong = asked[differs.any(axis=1)]\n",
        "        wrong = asked[:0]\n",
        f"{VERIFY}::test_a_changed_row",
    ),
)

WHAT_GOES = (
    mutant(
        "pruning looks at customers only",
        "a shop forgets purchases that its tiles are made of",
        "adapters/postgres.py",
        "kind = 'customer' AND owner = customer_id OR kind = 'merchant' AND owner = merchant_id",
        "kind = 'customer' AND owner = customer_id",
        f"{PRUNE}::test_a_fold_of_what_is_kept_is_a_fold_of_everything",
    ),
    mutant(
        "pruning looks back half as far as a profile",
        "a profile that is rebuilt lacks purchases",
        "pipeline/prune.py",
        "log.look_below(floor, HORIZON_MS)",
        "log.look_below(floor, HORIZON_MS // 2)",
        f"{PRUNE}::test_a_fold_of_what_is_kept_is_a_fold_of_everything",
    ),
    mutant(
        "rows go and the floor stays",
        "verify reports what was pruned as lost",
        "pipeline/prune.py",
        "    log.raise_floor(floor)\n",
        "",
        f"{PRUNE}::test_nobody_can_tell_that_a_log_was_pruned",
    ),
    mutant(
        "verify compares what has no past any more",
        "a pruned log looks broken",
        "pipeline/verify.py",
        "            if not is_whole(row, self.floor):\n",
        "            if False:\n",
        f"{PRUNE}::test_nobody_can_tell_that_a_log_was_pruned",
    ),
    mutant(
        "verify does not see the floor rise",
        "a pruning beside it looks like a loss",
        "pipeline/verify.py",
        "    if log.floor() != floor:\n",
        "    if False:\n",
        f"{PRUNE}::test_a_floor_that_rises_while_we_look_is_said",
    ),
    mutant(
        "replay does not know the floor",
        "a decision without its past is told as another one",
        "pipeline/replay.py",
        "    if not is_whole(row, log.floor()):",
        "    if False:",
        f"{PRUNE}::test_what_is_below_the_floor_is_no_example_and_no_evidence",
    ),
)

HARMLESS = (
    harmless(
        "a store that is up to date is read again",
        "there is nothing to learn between two equal places: a claim asks once more",
        "pipeline/stream.py",
        "    if watermark == logged > 0:\n        return\n",
        "",
        WORKER,
        SETBACKS,
    ),
)

MUTANTS = (
    *THE_LOG,
    *THE_STORE,
    *THE_BUS,
    *WHO_IS_LET_IN,
    *OVER_HTTP,
    *LABELS_AND_SHOPS,
    *MODELS,
    *PROOF,
    *WHAT_GOES,
    *HARMLESS,
)
