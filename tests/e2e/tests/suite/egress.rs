//! The annotation a3s.box/egress: what a guest may open, and what others open to it.

use std::net::Ipv4Addr;
use std::time::Duration;

use a3s_box_cri::proto::{DnsConfig, PodSandboxConfig};
use a3s_box_e2e::client::Client;
use a3s_box_e2e::wait;
use anyhow::{Context, Result, ensure};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, UdpSocket};
use tonic::Code;

use crate::cli_run::page;
use crate::suite::{Suite, launch};

/// The host, as pods of the suite's network see it.
const HOST: Ipv4Addr = Ipv4Addr::new(10, 213, 79, 1);
const PATIENCE: Duration = Duration::from_secs(20);

fn with_policy(mut config: PodSandboxConfig, policy: &str) -> PodSandboxConfig {
    config.annotations.insert("a3s.box/egress".to_owned(), policy.to_owned());
    config.dns_config = Some(DnsConfig { servers: vec![HOST.to_string()], ..Default::default() });
    config
}

/// Greets whoever connects; the port.
async fn greeter() -> Result<u16> {
    let listener = TcpListener::bind("0.0.0.0:0").await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            // Who has left again is not greeted.
            let _ = stream.write_all(b"hello\n").await;
        }
    });
    Ok(port)
}

/// Answers every question for a name with the host's address, as long as it is not dropped.
async fn name_server() -> Result<tokio::task::AbortHandle> {
    let socket = UdpSocket::bind((HOST, 53)).await.context("port 53 of the pods' gateway")?;
    let serve = async move {
        let mut message = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut message).await {
            let mut answer = message[..length].to_vec();
            let Some(end) = question_end(&answer) else { continue };
            let is_a = answer[end - 4..end] == [0, 1, 0, 1];
            answer.truncate(end);
            // A response without an error: one question, one answer or none.
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
            if is_a {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                answer.extend(HOST.octets());
            }
            let _ = socket.send_to(&answer, from).await;
        }
    };
    Ok(tokio::spawn(serve).abort_handle())
}

/// Where the first question ends: after its labels, type and class.
fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = 12;
    while *message.get(at)? != 0 {
        at += 1 + usize::from(message[at]);
    }
    (at + 5 <= message.len()).then_some(at + 5)
}

/// What a container gets from a port of a host.
async fn dial(client: &mut Client, container: &str, host: &str, port: u16) -> Result<String> {
    let line = format!("nc -w 3 {host} {port} < /dev/null");
    let seen = client.exec(container, &["sh", "-c", &line], 30).await?;
    Ok(String::from_utf8_lossy(&seen.stdout).into_owned())
}

pub(crate) async fn a_guest_opens_what_its_policy_says_and_answers_everybody(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let port = greeter().await?;
    let serve = "mkdir -p /srv; echo the page > /srv/page; httpd -p 8080 -h /srv; sleep 3600";
    for (name, policy, reaches) in [("listed", "10.213.79.1", true), ("closed", "none", false)] {
        let config = with_policy(suite.pod(name)?, policy);
        let pod = client.run_pod(&config).await?;
        let main = launch(&mut client, &pod, suite.script("main", serve), &config).await?;
        let said = dial(&mut client, &main, &HOST.to_string(), port).await?;
        ensure!((said == "hello\n") == reaches, "{policy}: {said:?}");
        let page = page_of(&mut client, &pod).await?;
        ensure!(page.ends_with("the page\n"), "{policy}: {page:?}");
        client.remove_pod(&pod).await?;
    }
    let refused = client.run_pod(&with_policy(suite.pod("refused")?, "10.213.79.1/8")).await;
    let status = refused.err().context("a policy that means nothing is refused")?;
    ensure!(
        status.code() == Code::InvalidArgument && status.message().contains("a3s.box/egress"),
        "{status:?}"
    );
    Ok(())
}

/// The page of a pod, whose server may not listen yet.
async fn page_of(client: &mut Client, pod: &str) -> Result<String> {
    let ip = client.pod_status(pod).await?.network.context("a pod has a network")?.ip;
    wait::until("the pod's page", PATIENCE, || {
        let page = page(&ip, 8080);
        async move { Ok(page.await.ok()) }
    })
    .await
}

pub(crate) async fn a_name_opens_what_the_guest_is_told_for_it(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let port = greeter().await?;
    let config = with_policy(suite.pod("named")?, "agents.example");
    let pod = client.run_pod(&config).await?;
    let main = launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;
    let server = name_server().await?;
    ensure!(dial(&mut client, &main, &HOST.to_string(), port).await?.is_empty(), "nothing was asked for yet");
    ensure!(dial(&mut client, &main, "other.example", port).await?.is_empty(), "a name that is not listed");
    let said = dial(&mut client, &main, "agents.example", port).await?;
    ensure!(said == "hello\n", "{said:?}");
    server.abort();
    client.remove_pod(&pod).await?;
    Ok(())
}
