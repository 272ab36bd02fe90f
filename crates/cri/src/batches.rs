//! Lists as streams of small messages: none is ever near the 4 MiB that gRPC clients take.

use std::iter;

use futures::{StreamExt, stream};
use prost::Message;
use tonic::codegen::BoxStream;

/// Octets of the items of one message; one item that is larger has a message of its own.
const MESSAGE_SIZE: usize = 64 * 1024;

/// The items in their order, in as few messages as their size allows; no message if there are none.
pub(crate) fn batches<T, R>(items: Vec<T>, respond: fn(Vec<T>) -> R) -> BoxStream<R>
where
    T: Message + 'static,
    R: Send + 'static,
{
    let mut items = items.into_iter().peekable();
    let messages = iter::from_fn(move || {
        let first = items.next()?;
        let mut size = first.encoded_len();
        let mut batch = vec![first];
        while let Some(item) = items.next_if(|item| size + item.encoded_len() <= MESSAGE_SIZE) {
            size += item.encoded_len();
            batch.push(item);
        }
        Some(Ok(respond(batch)))
    });
    stream::iter(messages).boxed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{Container, StreamContainersResponse};

    async fn sizes(items: &[usize]) -> Vec<usize> {
        let container = |size: &usize| Container { image_ref: "x".repeat(*size), ..Container::default() };
        let items = items.iter().map(container).collect();
        let stream = batches(items, |containers| StreamContainersResponse { containers });
        stream.map(|message| message.unwrap().containers.len()).collect().await
    }

    #[tokio::test]
    async fn messages_are_filled_and_an_item_too_large_is_sent_alone() {
        assert_eq!(sizes(&[]).await, Vec::<usize>::new());
        assert_eq!(sizes(&[10, 10, 10]).await, [3]);
        assert_eq!(sizes(&[40_000, 20_000, 10_000, 100_000, 1]).await, [2, 1, 1, 1]);
        assert!(sizes(&[1000; 1000]).await.iter().all(|count| *count <= 65));
    }
}
