"""The contract of all transports, as scenarios that all addresses of one job run together.

A scenario is called at every address, 0 included. It needs at least three workers. It must not
leave messages or transfers behind, because scenarios run one after the other.
"""

from collections.abc import Callable

from tests.transport import block_scenarios as blocks
from tests.transport import message_scenarios as messages
from tests.transport.participant import Participant

SCENARIOS: list[Callable[[Participant], None]] = [
    messages.messages_of_a_link_arrive_in_order,
    messages.big_messages_arrive_complete_and_in_order,
    messages.many_may_send_to_one_at_once,
    messages.all_may_send_before_any_receives,
    blocks.blocks_arrive_in_the_right_places_bit_for_bit,
    blocks.a_receive_may_be_posted_before_the_blocks_are_sent,
    blocks.transfers_with_different_tags_do_not_mix,
    blocks.two_transfers_of_one_tag_arrive_one_after_the_other,
    blocks.a_drain_does_not_affect_other_transfers,
    blocks.a_transfer_with_another_block_size_fails_and_leaves_nothing_behind,
    blocks.a_transfer_shorter_or_longer_than_expected_fails_and_affects_no_other,
    blocks.a_drain_receives_all_blocks_of_a_transfer_whatever_its_size,
    blocks.a_flipped_bit_is_detected_and_affects_no_other_transfer,
    blocks.all_rounds_of_a_migration_may_be_in_flight_at_once,
    blocks.an_empty_transfer_is_done_at_once,
    messages.wake_ends_a_wait_that_comes_after_it,
    blocks.the_arena_cannot_be_detached_during_a_transfer,
]
