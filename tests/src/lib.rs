//! The conformance suite that every kvlane backend passes, and what tests across crates share.
//!
//! A backend supplies a [`fixture::Factory`]; [`conformance!`] turns every claim into a test of its own:
//!
//! ```ignore
//! mod memory {
//!     kvlane_tests::conformance!(super::Memory);
//! }
//! ```

pub mod claims;
pub mod fixture;
pub mod layouts;
pub mod process;
pub mod soak;
pub mod timing;
pub mod worker;

/// Generates one `#[test]` per claim for the factory that the expression names.
#[macro_export]
macro_rules! conformance {
    ($factory:expr) => {
        $crate::conformance! { @tests $factory;
            visibility: stored_bytes_come_back_in_every_layout
            visibility: stored_bytes_stay_when_the_cache_block_is_reused
            visibility: lookup_stops_at_the_first_hole
            visibility: an_unknown_key_is_a_miss
            visibility: another_namespace_is_a_miss
            visibility: a_finished_store_is_visible_to_all_peers
            visibility: reset_hides_everything_from_everyone
            visibility: a_store_from_before_a_reset_does_not_appear_after_it
            visibility: after_a_reset_blocks_can_be_stored_again
            stores: a_store_is_invisible_until_it_is_finished
            stores: layers_may_become_ready_in_any_order_and_twice
            stores: a_cancelled_store_makes_nothing_visible
            stores: a_store_past_its_deadline_ends_and_makes_nothing_visible
            stores: storing_a_present_key_is_done_and_changes_nothing
            stores: an_empty_store_is_done
            promises: a_reserved_block_is_pending_until_its_deadline
            promises: a_reserved_block_is_pending_until_it_is_withdrawn
            promises: a_promise_is_taken_back_only_by_its_maker
            promises: a_store_keeps_its_promise
            promises: a_reservation_leaves_present_blocks_as_they_are
            loads: absent_keys_are_reported_by_position_and_the_rest_is_right
            loads: a_load_touches_no_other_block
            loads: both_orders_bring_the_same_bytes
            loads: a_layer_is_complete_once_it_was_waited_for
            loads: waiting_for_a_layer_of_a_missed_load_says_no
            loads: a_load_past_its_deadline_is_a_miss
            loads: an_empty_load_is_done
            completions: wait_delivers_a_completion_once
            completions: poll_delivers_each_completion_once
            completions: polling_and_waiting_threads_never_share_a_completion
            completions: wait_honours_its_deadline
            completions: unknown_jobs_are_refused_and_cancelling_them_is_ignored
            refusals: stores_with_wrong_blocks_are_refused_and_change_nothing
            refusals: loads_with_wrong_blocks_are_refused_and_change_nothing
            refusals: layers_out_of_range_are_refused
            pressure: many_threads_store_and_load_right_bytes
            pressure: eviction_never_returns_wrong_bytes
            pressure: chains_that_begin_alike_evict_each_other
            pressure: a_store_larger_than_the_place_says_what_was_dropped
        }
    };
    (@tests $factory:expr; $($group:ident: $claim:ident)*) => {
        $(
            #[test]
            fn $claim() {
                $crate::claims::$group::$claim(&$factory);
            }
        )*

        #[test]
        fn the_list_of_claims_is_complete() {
            $crate::claims::check_list(&[$(stringify!($claim)),*]);
        }
    };
}
