//! Set-ups and teardowns that stop at any point, and a new daemon that knows nothing but the box id.

mod common;

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use a3s_box_net::TeardownRequest;
use common::{Node, SetUp, box_id, on_a_local_node, on_a_node, request};

/// A future that is given up after so many polls: every await it passes is one point at which a
/// daemon can die.
struct GivenUpAfter<'a, F> {
    polls: usize,
    work: Pin<&'a mut F>,
}

impl<F: Future> Future for GivenUpAfter<'_, F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.polls == 0 {
            return Poll::Ready(None);
        }
        self.polls -= 1;
        self.work.as_mut().poll(context).map(Some)
    }
}

async fn given_up_after<F: Future>(polls: usize, work: F) -> Option<F::Output> {
    GivenUpAfter { polls, work: pin!(work) }.await
}

fn network(node: &Node) {
    let portmap = r#", { "type": "portmap", "capabilities": { "portMappings": true } }"#;
    node.bridge_network("1.0.0", r#""ipMasq": true,"#, portmap);
}

#[test]
fn a_setup_that_stops_at_any_point_is_undone_by_id_alone() {
    on_a_node(async |node| {
        network(&node);
        stop_setups_at_every_point(&node).await;
    });
}

#[test]
fn so_is_one_on_the_local_network() {
    on_a_local_node(async |node| stop_setups_at_every_point(&node).await);
}

async fn stop_setups_at_every_point(node: &Node) {
    let networking = node.site.networking();
    networking.setup(request(9)).await.unwrap();
    assert!(networking.teardown(TeardownRequest::of(box_id(9))).await.is_empty());
    let before = node.inventory();

    let mut polls = 1;
    while given_up_after(polls, networking.setup(request(1))).await.is_none() {
        let errors = networking.teardown(TeardownRequest::of(box_id(1))).await;
        assert!(errors.is_empty(), "given up after {polls} polls: {errors:?}");
        assert_eq!(node.inventory(), before, "given up after {polls} polls");
        polls += 1;
    }
    assert!(polls > 5, "the set-up was interrupted only {polls} times");
    assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
    assert_eq!(node.inventory(), before);
}

#[test]
fn a_teardown_that_stops_at_any_point_is_finished_by_the_next() {
    on_a_node(async |node| {
        network(&node);
        let networking = node.site.networking();
        networking.setup(request(9)).await.unwrap();
        assert!(networking.teardown(TeardownRequest::of(box_id(9))).await.is_empty());
        let before = node.inventory();

        let mut polls = 1;
        loop {
            networking.setup(request(1)).await.unwrap();
            let finished = given_up_after(polls, networking.teardown(TeardownRequest::of(box_id(1)))).await;
            let errors = networking.teardown(TeardownRequest::of(box_id(1))).await;
            assert!(errors.is_empty(), "given up after {polls} polls: {errors:?}");
            let after = node.inventory();
            let ours = |i: &common::Inventory| {
                (
                    i.links.clone(),
                    i.mounts.clone(),
                    i.namespaces.clone(),
                    i.records.clone(),
                    i.allocations.clone(),
                )
            };
            assert_eq!(ours(&after), ours(&before), "given up after {polls} polls");
            if finished.is_some() {
                break;
            }
            polls += 1;
        }
        assert!(polls > 3, "the teardown was interrupted only {polls} times");
    });
}

#[test]
fn setting_up_again_what_is_half_there_starts_from_a_clean_slate() {
    on_a_node(async |node| {
        network(&node);
        let first = node.site.networking().setup(request(1)).await.unwrap();
        // A daemon that has lost its memory gets the same request again.
        let second = node.site.networking().setup(request(1)).await.unwrap();
        assert_eq!(first.netns, second.netns);
        let held = node.inventory();
        assert_eq!((held.namespaces.len(), held.records.len(), held.allocations.len()), (1, 1, 2));
        assert!(node.site.networking().teardown(TeardownRequest::of(box_id(1))).await.is_empty());
        assert_eq!(node.inventory().allocations, Vec::<String>::new());
    });
}
