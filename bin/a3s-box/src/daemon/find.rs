//! Which container or pod somebody means.

use anyhow::bail;

use a3s_box_cri::client::{Client, Container, Pod, State};

/// The first characters of an id, as lists show them.
pub(super) fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// A container by the beginning of its id, its name, or `POD/NAME`.
pub(super) async fn container(client: &mut Client, text: &str) -> anyhow::Result<Container> {
    let (containers, pods) = (client.containers().await?, client.pods().await?);
    choose_container(containers, &pods, text)
}

/// A pod by the beginning of its id, its name, or `NAMESPACE/NAME`.
pub(super) async fn pod(client: &mut Client, text: &str) -> anyhow::Result<Pod> {
    choose_pod(client.pods().await?, text)
}

fn choose_container(containers: Vec<Container>, pods: &[Pod], text: &str) -> anyhow::Result<Container> {
    let called = |container: &Container| match text.rsplit_once('/') {
        None => container.name == text,
        Some((pod, name)) => {
            let of_pod = pods.iter().find(|other| other.id == container.pod_id);
            container.name == name && of_pod.is_some_and(|other| matches(other, pod))
        }
    };
    let mut found: Vec<_> = containers
        .into_iter()
        .filter(|container| is_prefix(text, &container.id) || called(container))
        .collect();
    // Of several attempts the one that lives is meant.
    if found.iter().filter(|container| container.state == State::Running).count() == 1 {
        found.retain(|container| container.state == State::Running);
    }
    only("container", text, "ps -a", found, |container| &container.id)
}

fn choose_pod(pods: Vec<Pod>, text: &str) -> anyhow::Result<Pod> {
    let mut found: Vec<_> = pods.into_iter().filter(|pod| matches(pod, text)).collect();
    if found.iter().filter(|pod| pod.ready).count() == 1 {
        found.retain(|pod| pod.ready);
    }
    only("pod", text, "ps -a --pods", found, |pod| &pod.id)
}

fn matches(pod: &Pod, text: &str) -> bool {
    let named = match text.split_once('/') {
        None => pod.name == text,
        Some((namespace, name)) => pod.namespace == namespace && pod.name == name,
    };
    named || is_prefix(text, &pod.id)
}

/// An empty text is no prefix of anything.
fn is_prefix(text: &str, id: &str) -> bool {
    !text.is_empty() && id.starts_with(text)
}

fn only<T>(
    kind: &str,
    text: &str,
    list: &str,
    mut found: Vec<T>,
    id: impl Fn(&T) -> &str,
) -> anyhow::Result<T> {
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => bail!("there is no {kind} {text:?}; `a3s-box {list}` lists what there is"),
        _ => {
            let ids: Vec<_> = found.iter().map(|item| short(id(item))).collect();
            bail!("{text:?} may be any of several {kind}s ({}); give the beginning of an id", ids.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod_(id: &str, namespace: &str, name: &str, ready: bool) -> Pod {
        let (id, name, namespace) = (id.to_owned(), name.to_owned(), namespace.to_owned());
        Pod { id, name, namespace, ready, created_at_ns: 0, attempt: 0 }
    }

    fn container_(id: &str, name: &str, state: State, pod_id: &str) -> Container {
        let (id, name, pod_id) = (id.to_owned(), name.to_owned(), pod_id.to_owned());
        Container { id, name, image: String::new(), state, created_at_ns: 0, attempt: 0, pod_id }
    }

    fn chosen(text: &str) -> Result<String, String> {
        let pods = [pod_("p1", "default", "web", true), pod_("p2", "kube", "web2", true)];
        let containers = vec![
            container_("aa11", "main", State::Exited, "p1"),
            container_("aa22", "main", State::Running, "p1"),
            container_("bb11", "side", State::Running, "p1"),
            container_("bb22", "side", State::Running, "p2"),
            container_("cc11", "old", State::Exited, "p2"),
            container_("cc22", "old", State::Exited, "p2"),
        ];
        choose_container(containers, &pods, text).map(|found| found.id).map_err(|error| error.to_string())
    }

    #[test]
    fn a_container_is_found_by_prefix_by_name_and_by_pod_and_name() {
        assert_eq!(chosen("bb2").as_deref(), Ok("bb22"));
        assert_eq!(chosen("aa11").as_deref(), Ok("aa11"));
        assert_eq!(chosen("main").as_deref(), Ok("aa22"), "the attempt that lives");
        assert_eq!(chosen("web/side").as_deref(), Ok("bb11"));
        assert_eq!(chosen("kube/web2/side").as_deref(), Ok("bb22"));
    }

    #[test]
    fn who_may_be_several_or_nobody_is_refused() {
        assert!(chosen("side").unwrap_err().contains("bb11, bb22"));
        assert!(chosen("old").is_err());
        assert!(chosen("").is_err());
        assert!(chosen("nobody").unwrap_err().contains("ps -a"));
    }

    #[test]
    fn a_pod_is_found_by_name_with_or_without_its_namespace() {
        let pods =
            || vec![pod_("p1", "a", "web", true), pod_("p2", "b", "web", true), pod_("p3", "b", "db", false)];
        let chosen = |text| choose_pod(pods(), text).map(|found| found.id).ok();
        assert_eq!(chosen("b/web").as_deref(), Some("p2"));
        assert_eq!(chosen("db").as_deref(), Some("p3"));
        assert_eq!(chosen("web"), None);
    }
}
