//! The mesh on a real Kubernetes: installed by its chart, with injected pods, from outside.
//!
//! `tests/cluster/run` builds the images, loads them and runs this. It needs `kubectl`, `helm` and
//! the kubeconfig of a cluster on which the mesh is not installed, in `WEFT_TEST_KUBECONFIG`;
//! without one, everything is skipped. The tests run one after another, in the order of the list:
//! the first installs the mesh, the last removes it.

#![allow(clippy::unwrap_used)] // The whole crate is a test.

mod apps;
mod bookshop;
mod cli;
mod failures;
mod identity;
mod install;
mod lifecycle;
mod outside;
mod places;
mod policy;
mod resilience;
mod rollout;
mod traffic;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use weft_tests::kube;

macro_rules! trials {
    ($($module:ident::$name:ident,)*) => {
        [$((concat!(stringify!($module), "::", stringify!($name)), $module::$name as fn())),*]
    };
}

const TRIALS: &[(&str, fn())] = &trials![
    install::the_chart_installs,
    traffic::pods_are_injected_as_they_should,
    traffic::services_pods_and_names_are_reached_by_mutual_tls,
    traffic::nothing_goes_over_the_wire_in_the_clear,
    traffic::plain_pods_are_served_until_strict,
    traffic::probes_go_on_under_strict,
    traffic::tcp_probes_ask_the_application,
    traffic::calls_between_namespaces_carry_both_identities,
    places::a_local_service_keeps_to_the_node,
    places::conditions_decide_who_is_used,
    places::hints_keep_to_the_zone,
    places::a_distribution_prefers_what_is_near,
    lifecycle::jobs_finish,
    lifecycle::jobs_fail,
    lifecycle::the_proxy_is_there_first_and_last,
    lifecycle::init_containers_have_network,
    lifecycle::scaling_reaches_the_proxies,
    rollout::a_rolling_restart_of_the_server_loses_nothing,
    rollout::a_rolling_restart_of_the_client_loses_nothing,
    rollout::a_rolling_restart_of_the_control_plane_loses_nothing,
    rollout::all_replicas_of_the_control_plane_may_die,
    failures::a_killed_application_costs_little,
    failures::a_killed_proxy_costs_little,
    failures::a_pod_that_vanishes_costs_little,
    policy::shares_and_headers_decide,
    policy::retries_make_success_whole_without_a_storm,
    policy::faults_are_injected_and_taken_back,
    policy::a_limit_is_kept_for_each_identity,
    policy::sessions_outlive_a_rollout,
    policy::changes_under_load_cost_nothing,
    cli::both_sides_of_a_request_are_told,
    cli::requests_are_seen_as_they_end,
    resilience::a_breaker_opens_and_closes,
    resilience::an_ill_endpoint_is_ejected_and_returns,
    resilience::copies_go_to_the_mirror_and_cost_nothing,
    resilience::deadlines_of_grpc_hold,
    outside::connections_are_shared_by_weight_and_by_name,
    outside::plaintext_becomes_tls_outside,
    identity::certificates_are_renewed_under_load,
    identity::roots_are_rotated_under_load,
    identity::an_authority_of_ones_own_takes_over_under_load,
    bookshop::a_newcomers_tour,
    bookshop::a_visit_is_one_trace_in_jaeger,
    install::an_upgrade_keeps_certificates,
    install::nothing_stays_behind,
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let missing = kube::kubeconfig().is_none();
    if missing {
        eprintln!(
            "skipped: WEFT_TEST_KUBECONFIG names no cluster (tests/cluster/run sets everything up)"
        );
    }
    let trials = TRIALS
        .iter()
        .map(|(name, test)| {
            Trial::test(*name, || {
                test();
                Ok(())
            })
            .with_ignored_flag(missing)
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
