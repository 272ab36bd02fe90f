//! End to end: a real daemon, real VMs, over the CRI socket, on the backend that A3S_BOX_BACKEND names.
//!
//! One daemon serves all scenarios in turn (`--test-threads=1`); after each one the machine is compared with how it was
//! before, and the last one stops the daemon and compares with how everything began. Environment:
//!
//! - `A3S_BOX_DIST`: the installed layout under test (default `target/dist`)
//! - `A3S_BOX_BACKEND`: `qemu` (default) or `libkrun`
//! - `A3S_BOX_OTHER_DIST`: the layout of another build, whose pod this one goes on with; without it that is not tried
//! - `A3S_BOX_E2E_SHARED=1`: other daemons run on this machine; what they make is not held against this one
//! - `TMPDIR`: where the run's state folder is made; removed unless a scenario failed

mod across;
mod bad_input;
mod bad_machine;
mod bad_registry;
mod cli;
mod cli_run;
mod cli_streams;
mod containers;
mod deaths;
mod egress;
mod endings;
mod endurance;
mod events;
mod file_server;
mod images;
mod logs;
mod namespaces;
mod networks;
mod pods;
mod resources;
mod shared_volumes;
mod stats;
mod streams;
mod suite;
mod verity;
mod volumes;

use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};

use suite::Suite;

type Scenario = fn(&Suite) -> Pin<Box<dyn Future<Output = Result<()>> + '_>>;

macro_rules! scenarios {
    ($($module:ident::$name:ident),* $(,)?) => {
        &[$((concat!(stringify!($module), "::", stringify!($name)), |suite| Box::pin($module::$name(suite)))),*]
    };
}

const SCENARIOS: &[(&str, Scenario)] = scenarios![
    pods::the_daemon_says_who_it_is_and_that_it_is_ready,
    images::an_image_is_pulled_listed_and_removed,
    images::a_pull_by_digest_is_answered_with_the_same_image,
    bad_input::a_pod_without_metadata_is_refused,
    bad_input::an_unknown_runtime_handler_is_named,
    bad_input::an_unknown_image_is_not_found,
    bad_input::a_text_that_is_no_reference_is_refused,
    bad_input::objects_that_do_not_exist_are_not_found,
    bad_input::stopping_and_removing_what_does_not_exist_succeeds,
    bad_registry::a_registry_hangs,
    bad_registry::statuses_of_a_registry_keep_their_meaning,
    bad_registry::a_layer_that_is_cut_off_fails_the_pull,
    bad_registry::a_layer_with_other_bytes_than_promised_fails_the_pull,
    bad_registry::a_layer_with_names_that_cannot_be_fails_the_pull,
    bad_registry::a_config_that_lies_about_its_layers_fails_the_pull,
    images::a_pull_survives_kills_of_the_daemon_at_random_moments,
    pods::a_pod_lives_its_life_in_a_kernel_of_its_own,
    pods::a_running_pod_is_removed_by_force,
    pods::two_pods_run_side_by_side_and_lists_are_filtered,
    containers::stopping_means_sigterm_then_grace_then_sigkill,
    containers::exec_gives_output_code_and_keeps_its_limit,
    containers::the_time_is_the_hosts_and_no_timers,
    containers::environment_user_and_folder_come_from_image_and_pod,
    containers::a_program_that_cannot_be_started_says_why,
    containers::bad_paths_fail_with_their_reason,
    containers::a_profile_of_the_node_filters_system_calls,
    containers::a_storm_of_probes_is_answered,
    namespaces::a_pods_root_is_nobody_outside_of_it,
    namespaces::kernel_parameters_are_the_pods,
    namespaces::a_debugger_sees_the_processes_of_its_target,
    bad_input::containers_that_cannot_be_made_have_their_code_and_text,
    bad_registry::a_registry_that_hangs_costs_a_bounded_time,
    logs::streams_are_apart_and_partial_lines_are_marked,
    logs::a_rotated_log_is_reopened,
    events::a_pods_life_is_told_in_order,
    streams::commands_have_their_output_input_and_exit_code,
    streams::a_terminal_has_a_size_and_takes_keys,
    streams::several_clients_are_attached_and_their_input_ends_as_asked,
    streams::ports_that_only_listen_on_loopback_are_forwarded,
    streams::a_hundred_connections_are_open_at_once,
    streams::a_client_that_does_not_read_stops_nobody_else,
    streams::a_command_that_nobody_reads_takes_bounded_memory,
    streams::a_client_that_vanishes_ends_its_commands_input,
    streams::many_short_commands_leave_nothing_in_the_daemon,
    deaths::a_killed_vmm_takes_its_containers_along,
    deaths::a_vmm_that_the_host_kills_for_memory_is_told,
    deaths::a_guests_panic_is_told_with_its_words,
    deaths::a_guest_that_powers_itself_off_is_told,
    deaths::an_agent_that_is_killed_is_told,
    egress::a_guest_opens_what_its_policy_says_and_answers_everybody,
    egress::a_name_opens_what_the_guest_is_told_for_it,
    volumes::a_folder_of_the_host_is_shared_as_asked,
    volumes::an_image_is_mounted_read_only,
    file_server::more_files_than_descriptors_are_walked,
    file_server::an_overlay_keeps_its_state_on_a_volume,
    shared_volumes::containers_of_a_pod_share_one_file_system,
    shared_volumes::databases_in_two_containers_wait_for_each_other,
    shared_volumes::two_targets_of_a_run_are_one_file_system,
    verity::a_sealed_layer_cannot_change,
    resources::limits_change_while_a_container_runs,
    resources::who_takes_too_much_memory_is_killed_and_it_is_said,
    stats::a_containers_use_of_cpu_memory_and_disk_is_told,
    stats::a_pods_use_and_its_traffic_are_told,
    images::layers_of_every_encoding_hide_what_they_delete,
    images::an_image_has_equal_layers_a_root_of_its_own_and_volumes,
    cli::run_gives_the_commands_output_and_exit_code,
    cli::doctor_reports_on_this_machine,
    cli_run::failures_to_run_have_dockers_exit_codes,
    cli_run::stdin_a_volume_and_the_user_reach_the_command,
    cli_run::volumes_hide_none_of_each_other_and_read_only_ones_are_so_as_a_whole,
    cli_run::the_flags_of_dockers_users_mean_what_they_say,
    cli_run::programs_need_not_be_root_to_listen_on_low_ports_and_to_ping,
    cli_run::a_signal_reaches_the_command_and_the_third_one_kills_it,
    cli_run::a_run_that_was_killed_is_cleaned_up_by_the_next,
    cli_run::several_runs_go_side_by_side,
    cli_run::a_terminal_has_the_users_size_and_takes_keys,
    cli_run::output_without_a_reader_ends_the_command,
    cli_run::a_published_port_leads_into_the_box_without_cni,
    cli_streams::a_shell_at_a_terminal_feels_as_at_home,
    cli_streams::files_are_copied_both_ways,
    cli_streams::logs_are_cut_and_followed_to_the_containers_end,
    cli_streams::ports_are_forwarded_to_this_machine,
    cli_streams::a_detached_command_is_listed_entered_stopped_and_removed,
    networks::pods_reach_each_other_and_the_host_over_both_families,
    networks::a_guest_boots_while_a_slow_plugin_makes_two_interfaces,
    networks::a_nic_has_a_queue_per_processor_where_they_run_side_by_side,
    bad_machine::a_guest_that_never_gets_ready_fails_in_time_and_leaves_nothing,
    bad_machine::a_guest_that_dies_while_booting_shows_its_last_words,
    bad_machine::a_full_disk_fails_the_pull_and_says_so,
    bad_machine::a_full_disk_fails_new_pods_and_keeps_the_others,
    bad_machine::a_daemon_without_descriptors_recovers,
    bad_machine::a_daemon_without_processes_recovers,
    bad_machine::a_missing_hypervisor_is_named,
    endurance::vmms_are_killed_again_and_again,
    endurance::pods_survive_kills_of_the_daemon_at_random_moments,
    endurance::dials_that_are_dropped_at_once_lose_no_pod,
    endurance::no_pod_is_lost_when_the_daemon_is_killed_while_it_dials,
    endurance::streams_end_in_every_order_and_lose_no_byte,
    endurance::pods_on_a_dual_stack_network_come_and_go,
    endurance::many_pods_come_and_go,
    across::a_pod_outlives_the_build_that_started_it,
    suite::nothing_is_left_when_the_daemon_has_stopped,
];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list {
        let trials = SCENARIOS.iter().map(|(name, _)| Trial::test(*name, || Ok(()))).collect();
        return libtest_mimic::run(&arguments, trials).exit_code();
    }
    if arguments.test_threads != Some(1) {
        eprintln!("the scenarios share one daemon: run with --test-threads=1");
        return ExitCode::FAILURE;
    }
    let suite = match Suite::start() {
        Ok(suite) => Arc::new(suite),
        Err(error) => {
            eprintln!("the suite could not start: {}", chain(&error));
            return ExitCode::FAILURE;
        }
    };
    println!(
        "backend {}, layout {}, state {}",
        suite.backend(),
        suite.layout_shown(),
        suite.state().display()
    );
    let trials = SCENARIOS.iter().map(|(name, scenario)| trial(&suite, name, *scenario)).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if conclusion.has_failed() {
        suite.keep_state();
    }
    conclusion.exit_code()
}

fn trial(suite: &Arc<Suite>, name: &'static str, scenario: Scenario) -> Trial {
    let suite = Arc::clone(suite);
    Trial::test(name, move || suite.run(scenario).map_err(|error| Failed::from(chain(&error))))
}

/// The failure with all its causes, one per line.
fn chain(error: &anyhow::Error) -> String {
    error.chain().map(|cause| cause.to_string()).collect::<Vec<_>>().join("\n  caused by: ")
}
