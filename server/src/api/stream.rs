//! Streams of answers, driven by the connection that reads them.
//!
//! A streaming handler is one future that sends answers as it goes. It runs while its client reads and ends when the
//! client goes away; no task of its own outlives it.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tonic::Status;

/// Where a handler sends its answers; holds one that is not read yet.
#[derive(Debug)]
pub struct Outlet<T> {
    // A channel has room for 32 from the start, whatever its limit is: boxed, that is little for a silent stream.
    answers: mpsc::Sender<Box<T>>,
}

impl<T> Outlet<T> {
    /// Sends an answer, waiting until the one before it is read.
    pub async fn send(&self, answer: T) {
        // The reader is what drives this future: when it is gone, so are we.
        let _ = self.answers.send(Box::new(answer)).await;
    }
}

/// Answers of a handler.
pub type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

struct Driven<T, F> {
    handler: Option<Pin<Box<F>>>,
    answers: mpsc::Receiver<Box<T>>,
    failure: Option<Status>,
}

impl<T, F: Future<Output = Result<(), Status>>> Stream for Driven<T, F> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Poll::Ready(Some(answer)) = self.answers.poll_recv(context) {
            return Poll::Ready(Some(Ok(*answer)));
        }
        if let Some(handler) = self.handler.as_mut()
            && let Poll::Ready(result) = handler.as_mut().poll(context)
        {
            self.failure = result.err();
            self.handler = None;
        }
        match self.answers.poll_recv(context) {
            Poll::Ready(Some(answer)) => Poll::Ready(Some(Ok(*answer))),
            Poll::Ready(None) => Poll::Ready(self.failure.take().map(Err)),
            Poll::Pending => Poll::Pending,
        }
    }
}

/// Starts a handler and waits for its first answer. A handler that fails before has failed as a unary call does: the
/// client gets the status alone.
///
/// # Errors
/// What the handler failed with before its first answer.
pub async fn start<T, F>(handler: impl FnOnce(Outlet<T>) -> F) -> Result<Answers<T>, Status>
where
    T: Send + 'static,
    F: Future<Output = Result<(), Status>> + Send + 'static,
{
    let (sender, answers) = mpsc::channel(1);
    let handler = Some(Box::pin(handler(Outlet { answers: sender })));
    let mut driven = Driven { handler, answers, failure: None };
    match driven.next().await {
        Some(Err(status)) => Err(status),
        Some(Ok(first)) => Ok(Box::pin(futures_util::stream::iter([Ok(first)]).chain(driven))),
        None => Ok(Box::pin(futures_util::stream::empty())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn answers_come_in_order_and_then_the_end() {
        let stream = start(|outlet| async move {
            for n in 0..5 {
                outlet.send(n).await;
            }
            Ok(())
        });
        let got: Vec<_> = stream.await.unwrap().map(|answer| answer.unwrap()).collect().await;
        assert_eq!(got, [0, 1, 2, 3, 4]);
    }

    #[tokio::test]
    async fn a_failure_before_the_first_answer_is_a_failure_of_the_call() {
        let refused = start(|_outlet: Outlet<u8>| async { Err(Status::invalid_argument("no")) }).await;
        assert_eq!(refused.err().map(|status| status.code()), Some(tonic::Code::InvalidArgument));
    }

    #[tokio::test]
    async fn a_failure_after_answers_comes_behind_them() {
        let stream = start(|outlet| async move {
            outlet.send(1).await;
            outlet.send(2).await;
            Err(Status::unavailable("over"))
        });
        let got: Vec<_> = stream.await.unwrap().map(|answer| answer.map_err(|status| status.code())).collect().await;
        assert_eq!(got, [Ok(1), Ok(2), Err(tonic::Code::Unavailable)]);
    }
}
