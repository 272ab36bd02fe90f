//! What lists show: everything that a filter states must match; a filter that states nothing matches all.
//!
//! Ids match by prefix, because people filter by what `crictl` prints. Labels match exactly.

use std::collections::HashMap;

use a3s_box_runtime::{BoxStatus, SessionStatus};

use crate::proto::{
    Container, ContainerFilter, ContainerStatsFilter, PodSandbox, PodSandboxFilter, PodSandboxStatsFilter,
};

/// Whether a list of pod sandboxes shows `item`.
pub fn shows_sandbox(filter: &PodSandboxFilter, item: &PodSandbox) -> bool {
    item.id.starts_with(&filter.id)
        && filter.state.as_ref().is_none_or(|wanted| wanted.state == item.state)
        && has_labels(&item.labels, &filter.label_selector)
}

/// Whether a list of containers shows `item`.
pub fn shows_container(filter: &ContainerFilter, item: &Container) -> bool {
    item.id.starts_with(&filter.id)
        && item.pod_sandbox_id.starts_with(&filter.pod_sandbox_id)
        && filter.state.as_ref().is_none_or(|wanted| wanted.state == item.state)
        && has_labels(&item.labels, &filter.label_selector)
}

/// Whether a list of statistics shows a session. It is asked before anything is measured.
pub fn shows_stats(filter: &ContainerStatsFilter, state: &SessionStatus) -> bool {
    let labels = &state.spec.labels;
    state.id.as_str().starts_with(&filter.id)
        && state.box_id.as_str().starts_with(&filter.pod_sandbox_id)
        && filter.label_selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether a list of statistics shows a box.
pub fn shows_sandbox_stats(filter: &PodSandboxStatsFilter, state: &BoxStatus) -> bool {
    let labels = &state.spec.labels;
    state.id.as_str().starts_with(&filter.id)
        && filter.label_selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn has_labels(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use a3s_box_core::lifecycle::SessionPhase;
    use a3s_box_core::spec::SessionSpec;
    use a3s_box_core::{BoxId, SessionId};

    use super::*;
    use crate::proto::{ContainerState, ContainerStateValue, PodSandboxState, PodSandboxStateValue};

    fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn sandbox() -> PodSandbox {
        PodSandbox {
            id: "abc123".to_owned(),
            state: PodSandboxState::SandboxNotready.into(),
            labels: labels(&[("app", "web"), ("tier", "front")]),
            ..Default::default()
        }
    }

    fn container() -> Container {
        Container {
            id: "c0ffee".to_owned(),
            pod_sandbox_id: "abc123".to_owned(),
            state: ContainerState::ContainerRunning.into(),
            labels: labels(&[("app", "web")]),
            ..Default::default()
        }
    }

    #[test]
    fn an_empty_filter_shows_everything() {
        assert!(shows_sandbox(&PodSandboxFilter::default(), &sandbox()));
        assert!(shows_container(&ContainerFilter::default(), &container()));
    }

    #[test]
    fn each_part_of_a_sandbox_filter_must_match() {
        let state = |state: PodSandboxState| Some(PodSandboxStateValue { state: state.into() });
        let all = PodSandboxFilter {
            id: "abc".to_owned(),
            state: state(PodSandboxState::SandboxNotready),
            label_selector: labels(&[("app", "web")]),
        };
        assert!(shows_sandbox(&all, &sandbox()));
        for wrong in [
            PodSandboxFilter { id: "bc".to_owned(), ..all.clone() },
            PodSandboxFilter { state: state(PodSandboxState::SandboxReady), ..all.clone() },
            PodSandboxFilter { label_selector: labels(&[("app", "db")]), ..all.clone() },
            PodSandboxFilter { label_selector: labels(&[("app", "web"), ("x", "")]), ..all.clone() },
        ] {
            assert!(!shows_sandbox(&wrong, &sandbox()), "{wrong:?}");
        }
    }

    #[test]
    fn each_part_of_a_container_filter_must_match() {
        let state = |state: ContainerState| Some(ContainerStateValue { state: state.into() });
        let all = ContainerFilter {
            id: "c0ffee".to_owned(),
            state: state(ContainerState::ContainerRunning),
            pod_sandbox_id: "abc".to_owned(),
            label_selector: labels(&[("app", "web")]),
        };
        assert!(shows_container(&all, &container()));
        for wrong in [
            ContainerFilter { id: "c0ffee0".to_owned(), ..all.clone() },
            ContainerFilter { state: state(ContainerState::ContainerCreated), ..all.clone() },
            ContainerFilter { pod_sandbox_id: "abd".to_owned(), ..all.clone() },
            ContainerFilter { label_selector: labels(&[("tier", "front")]), ..all.clone() },
        ] {
            assert!(!shows_container(&wrong, &container()), "{wrong:?}");
        }
    }

    #[test]
    fn each_part_of_a_statistics_filter_must_match() {
        let state = SessionStatus {
            id: SessionId::from_random([0xc0; 32]),
            box_id: BoxId::from_random([0xb0; 32]),
            spec: SessionSpec { labels: [("app".to_owned(), "web".to_owned())].into(), ..Default::default() },
            image_id: String::new(),
            image_digest_ref: String::new(),
            phase: SessionPhase::Created,
            created_at_ns: 1,
            log_path: None,
            user: None,
            pid: None,
            info: Default::default(),
        };
        let all = ContainerStatsFilter {
            id: "c0".to_owned(),
            pod_sandbox_id: "b0b0".to_owned(),
            label_selector: labels(&[("app", "web")]),
        };
        assert!(shows_stats(&all, &state) && shows_stats(&ContainerStatsFilter::default(), &state));
        for wrong in [
            ContainerStatsFilter { id: "b0".to_owned(), ..all.clone() },
            ContainerStatsFilter { pod_sandbox_id: "c0".to_owned(), ..all.clone() },
            ContainerStatsFilter { label_selector: labels(&[("app", "db")]), ..all.clone() },
        ] {
            assert!(!shows_stats(&wrong, &state), "{wrong:?}");
        }
    }

    #[test]
    fn the_zero_state_can_be_asked_for() {
        let ready = PodSandboxFilter {
            state: Some(PodSandboxStateValue { state: PodSandboxState::SandboxReady.into() }),
            ..Default::default()
        };
        assert!(!shows_sandbox(&ready, &sandbox()));
    }
}
