//! What lists show: everything that a filter states must match; a filter that states nothing matches all.
//!
//! Ids match by prefix, because people filter by what `crictl` prints. Labels match exactly.

use std::collections::HashMap;

use crate::proto::{Container, ContainerFilter, PodSandbox, PodSandboxFilter};

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

fn has_labels(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
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
    fn the_zero_state_can_be_asked_for() {
        let ready = PodSandboxFilter {
            state: Some(PodSandboxStateValue { state: PodSandboxState::SandboxReady.into() }),
            ..Default::default()
        };
        assert!(!shows_sandbox(&ready, &sandbox()));
    }
}
