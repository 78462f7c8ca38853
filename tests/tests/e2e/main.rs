//! The mesh from outside: real proxies, a real control plane and real capture, on hosts of their
//! own. One module for each concern; `weft_tests` has what they stand on.
//!
//! Namespaces have to be entered before the first thread starts, so this is a program of its own
//! (`cargo test -p weft-tests --test e2e [NAME] [-- --list]`).

#![allow(clippy::unwrap_used)] // The whole crate is a test.

mod clear;
mod connections;
mod explaining;
mod external;
mod faults;
mod health;
mod http1;
mod http2;
mod places;
mod policy;
mod rates;
mod resilience;
mod routes;
mod seeing;
mod sessions;
mod tcp;
mod tls;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};
use weft_tests::binaries::binaries;
use weft_tests::netns::{Network, isolate};

macro_rules! trials {
    ($($module:ident::$name:ident,)*) => {
        [$((concat!(stringify!($module), "::", stringify!($name)), $module::$name as fn())),*]
    };
}

const TRIALS: &[(&str, fn())] = &trials![
    http1::bytes_pass_unchanged_both_ways,
    http1::a_workload_is_reached_by_its_own_address,
    http1::connections_are_kept,
    http1::a_server_that_closes_right_after_its_answer_is_heard_of,
    http1::pipelined_requests_are_answered_in_order,
    http1::chunks_and_trailers_pass_as_they_are,
    http1::interim_responses_pass,
    http1::an_upgrade_becomes_a_byte_copy,
    http1::connect_becomes_a_byte_copy,
    http1::answers_without_a_body,
    http1::http_1_0_without_a_host,
    http1::conflicting_framing_is_refused,
    http1::an_answer_may_come_before_the_request_has_ended,
    http1::events_are_streamed_at_once,
    http1::a_body_cut_off_arrives_cut_off,
    http1::a_reset_instead_of_an_answer_arrives_each_time,
    http1::a_refused_connection_is_a_clear_502_or_503,
    http1::a_client_that_stalls_in_its_head_holds_up_nobody,
    http1::an_answer_that_is_not_http_makes_the_connection_opaque,
    http1::old_and_odd_ways_of_servers_keep_the_connection,
    http1::a_head_cut_off_by_a_reset_arrives_before_the_reset,
    http1::large_heads_pass,
    http2::requests_with_prior_knowledge,
    http2::grpc_trailers_and_streams_both_ways,
    http2::deadlines_of_calls_are_kept_and_passed_on,
    http2::a_session_is_kept,
    http2::a_reset_stream_is_reset_at_the_far_end,
    http2::a_slow_reader_holds_the_sender_back,
    tcp::servers_that_speak_first_need_no_configuration,
    tcp::a_few_bytes_are_passed_on_at_once,
    tcp::half_closes_are_kept_both_ways,
    tcp::resets_arrive_as_resets,
    tcp::data_before_a_reset_arrives,
    tcp::what_follows_an_urgent_byte_is_not_left_behind,
    tcp::many_bytes_arrive_whole,
    tcp::ipv6_is_captured_too,
    tcp::what_is_not_in_the_mesh_passes_through,
    tcp::a_refused_connection_is_not_left_hanging,
    tls::nothing_goes_over_the_wire_in_the_clear,
    tls::what_goes_to_one_endpoint_shares_a_handshake,
    tls::the_applications_own_tls_passes_untouched,
    tls::strict_refuses_plaintext,
    tls::permissive_takes_plaintext,
    clear::tls_that_begins_late_has_one_connection,
    clear::a_request_that_comes_late_costs_an_orderly_connection,
    clear::what_is_declared_opaque_is_not_taken_for_http,
    policy::a_changed_policy_takes_effect_without_a_restart,
    policy::a_bad_policy_changes_nothing,
    policy::requests_over_the_limit_get_503,
    policy::an_open_circuit_is_answered_by_the_fallback,
    policy::failed_requests_are_tried_again_when_a_policy_says_so,
    policy::a_backend_gets_no_more_retries_than_its_policy_allows,
    policy::a_policy_for_a_rule_goes_before_its_routes_and_its_services,
    policy::routes_says_which_policy_each_field_comes_from,
    explaining::routes_says_what_a_client_without_a_proxy_gets,
    explaining::routes_says_what_the_destinations_proxies_will_do,
    policy::a_post_is_never_sent_twice_by_default,
    policy::a_request_timeout_is_504,
    faults::requests_are_delayed_and_aborted_as_the_policy_says,
    faults::http2_and_grpc_get_faults_of_their_own_kind,
    rates::each_identity_has_its_own_and_429_says_when_to_come_back,
    rates::headers_and_addresses_are_keys_and_a_change_takes_effect_on_open_connections,
    rates::a_global_limit_is_divided_by_the_ready_replicas,
    rates::grpc_calls_are_told_in_trailers,
    rates::who_asks_for_a_pause_gets_it_and_is_not_ejected,
    rates::grpc_calls_are_steered_away_by_trailers,
    rates::large_heads_are_refused_where_they_arrive,
    connections::a_connection_carries_as_many_requests_as_the_policy_says,
    connections::streams_of_a_worn_connection_are_not_lost,
    connections::silence_is_ended_before_and_within_an_answer,
    connections::silent_streams_are_ended_and_their_neighbours_are_not,
    resilience::traffic_goes_on_without_a_control_plane,
    resilience::a_killed_endpoint_costs_no_request,
    resilience::a_machine_that_is_gone_costs_time_and_no_request,
    resilience::an_application_that_stops_listening_costs_no_request,
    resilience::an_endpoint_that_fails_is_ejected_and_comes_back,
    resilience::another_endpoint_is_asked_when_one_takes_long,
    resilience::a_body_is_sent_to_another_endpoint_too,
    resilience::a_new_endpoint_gets_its_share_little_by_little,
    resilience::a_polite_restart_of_the_servers_proxy_loses_no_request,
    resilience::a_polite_restart_of_the_clients_proxy_loses_no_request,
    resilience::a_killed_proxy_comes_back,
    resilience::roots_are_rotated_under_load,
    routes::requests_are_split_by_weight,
    routes::matches_win_in_the_specified_order,
    routes::query_parameters_choose_and_what_matches_nothing_is_404,
    routes::redirects_say_where,
    routes::urls_are_rewritten,
    routes::request_headers_are_changed_and_nothing_else,
    routes::response_headers_are_changed,
    routes::a_backend_that_is_not_there_is_500_for_its_share,
    routes::rules_have_timeouts_and_retries,
    routes::a_consumer_route_is_for_its_own_namespace,
    routes::ports_and_pod_addresses_are_told_apart,
    routes::cross_origin_requests,
    sessions::a_client_stays_with_its_endpoint_through_restarts_and_a_rollout,
    health::an_endpoint_that_says_it_is_unwell_gets_no_requests,
    health::a_grpc_server_that_is_not_serving_gets_no_calls,
    health::an_application_that_takes_no_connection_is_unwell,
    health::requests_stay_in_the_clients_zone_while_it_is_well,
    places::a_local_service_is_for_clients_on_the_same_node,
    places::a_local_service_without_an_endpoint_here_refuses_connections,
    places::what_is_near_is_preferred,
    sessions::a_header_keeps_a_session_too,
    sessions::a_slow_endpoint_keeps_its_sessions_and_gets_no_new_ones,
    sessions::a_backends_policy_keeps_sessions_without_a_route,
    routes::a_backends_own_redirect_and_cors_hold_for_its_share,
    routes::copies_go_their_own_way,
    routes::a_changed_route_takes_effect,
    seeing::traces_are_begun_and_carried_on,
    seeing::nothing_is_added_to_requests_that_are_not_traced,
    seeing::requests_are_counted_on_both_sides,
    seeing::the_access_log_has_a_line_for_each_request,
    seeing::the_access_log_can_be_of_errors_only,
    seeing::the_admin_port_answers,
    http1::fields_of_the_hop_do_not_pass,
    external::plaintext_becomes_tls_with_a_server_that_proves_its_name,
    external::endpoints_follow_dns_and_outlive_it,
    external::a_dead_address_family_costs_little_and_no_request,
    external::the_original_destination_rules_whatever_the_host_says,
    external::hosts_on_one_address_are_told_apart_request_by_request,
    external::only_what_is_known_may_be_called,
    external::mutual_tls_shows_the_workloads_own_certificate,
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Each test has a handful of processes.
    arguments.test_threads.get_or_insert(2);
    let mut refused = None;
    if !arguments.list {
        if let Err(error) = binaries() {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
        // Whatever runs from here on is in namespaces of our own, or not at all.
        refused = isolate(Network::Private)
            .err()
            .map(|error| error.to_string());
    }
    let trials = TRIALS
        .iter()
        .map(|(name, body)| {
            let refused = refused.clone();
            Trial::ignorable_test(*name, move || {
                Ok(match refused {
                    Some(why) => Completion::ignored_with(why),
                    None => {
                        body();
                        Completion::Completed
                    }
                })
            })
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
