//! `ps`: what there is.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::HumanDuration;

use a3s_box_cri::client::{Client, Container, Pod, State};

use super::args::PsArgs;
use super::find::short;
use crate::table::lined_up;
use crate::tell;

pub(super) async fn ps(mut client: Client, args: PsArgs) -> anyhow::Result<u8> {
    let now = SystemTime::now();
    let mut pods = client.pods().await?;
    let text = if args.pods {
        pods.retain(|pod| args.all || pod.ready);
        match (args.quiet, args.json) {
            (true, _) => ids(pods.iter().map(|pod| &pod.id)),
            (_, true) => serde_json::to_string_pretty(&pods)? + "\n",
            _ => pod_table(&pods, now),
        }
    } else {
        let mut containers = client.containers().await?;
        containers.retain(|container| args.all || container.state == State::Running);
        match (args.quiet, args.json) {
            (true, _) => ids(containers.iter().map(|container| &container.id)),
            (_, true) => serde_json::to_string_pretty(&containers)? + "\n",
            _ => container_table(&containers, &pods, now),
        }
    };
    tell::out(text);
    Ok(0)
}

fn ids<'a>(ids: impl Iterator<Item = &'a String>) -> String {
    ids.map(|id| format!("{id}\n")).collect()
}

fn container_table(containers: &[Container], pods: &[Pod], now: SystemTime) -> String {
    let rows: Vec<_> = containers
        .iter()
        .map(|container| {
            let pod = pods.iter().find(|pod| pod.id == container.pod_id);
            let state = match container.state {
                State::Created => "created",
                State::Running => "running",
                State::Exited => "exited",
                State::Unknown => "unknown",
            };
            [
                short(&container.id).to_owned(),
                container.name.clone(),
                state.to_owned(),
                age(container.created_at_ns, now),
                container.image.clone(),
                pod.map_or_else(
                    || short(&container.pod_id).to_owned(),
                    |pod| format!("{}/{}", pod.namespace, pod.name),
                ),
            ]
        })
        .collect();
    lined_up(["CONTAINER", "NAME", "STATE", "CREATED", "IMAGE", "POD"], &rows)
}

fn pod_table(pods: &[Pod], now: SystemTime) -> String {
    let rows: Vec<_> = pods
        .iter()
        .map(|pod| {
            let state = if pod.ready { "ready" } else { "not ready" };
            let (namespace, name) = (pod.namespace.clone(), pod.name.clone());
            [short(&pod.id).to_owned(), name, namespace, state.to_owned(), age(pod.created_at_ns, now)]
        })
        .collect();
    lined_up(["POD", "NAME", "NAMESPACE", "STATE", "CREATED"], &rows)
}

fn age(created_at_ns: i64, now: SystemTime) -> String {
    let created = UNIX_EPOCH + Duration::from_nanos(u64::try_from(created_at_ns).unwrap_or(0));
    format!("{} ago", HumanDuration(now.duration_since(created).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_listed_with_their_pod() {
        let id = "ab".repeat(32);
        let pod = Pod {
            id: "cd".repeat(32),
            name: "web-1".to_owned(),
            namespace: "default".to_owned(),
            ready: true,
            created_at_ns: 0,
            attempt: 0,
        };
        let container = Container {
            id,
            name: "main".to_owned(),
            image: "busybox:1".to_owned(),
            state: State::Running,
            created_at_ns: 1_000_000_000_000,
            attempt: 0,
            pod_id: pod.id.clone(),
        };
        let now = UNIX_EPOCH + Duration::from_secs(1000 + 120);
        assert_eq!(
            container_table(std::slice::from_ref(&container), &[pod], now),
            "CONTAINER     NAME  STATE    CREATED        IMAGE      POD\n\
             abababababab  main  running  2 minutes ago  busybox:1  default/web-1\n"
        );
        assert!(container_table(&[container], &[], now).contains("cdcdcdcdcdcd"));
    }
}
