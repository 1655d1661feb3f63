//! Several addresses of one host, tried a little apart instead of one after the other (RFC 8305): one that swallows what
//! it is sent holds up nobody.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::sleep;

/// How long an attempt is waited for before the next begins beside it (RFC 8305, section 5).
const APART: Duration = Duration::from_millis(250);

/// The order of attempts: families in turn, beginning with that of the first address (RFC 8305, section 4).
fn in_turn(addresses: Vec<SocketAddr>) -> VecDeque<SocketAddr> {
    let Some(first) = addresses.first() else { return VecDeque::new() };
    let is_six = first.is_ipv6();
    let (mut same, mut other): (VecDeque<_>, VecDeque<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == is_six);
    let mut order = VecDeque::new();
    while let Some(address) = same.pop_front().or_else(|| other.pop_front()) {
        order.push_back(address);
        order.extend(other.pop_front());
    }
    order
}

/// What the first attempt that succeeds gave, and where. `known` is tried at once, before names are resolved; then each
/// address [`APART`] after the one before, or as soon as nothing else is under way. If none succeeds: what happened first.
pub(super) async fn first<T, F>(
    known: Option<SocketAddr>,
    resolved: impl Future<Output = io::Result<Vec<SocketAddr>>>,
    attempt: impl Fn(SocketAddr) -> F,
) -> io::Result<(T, SocketAddr)>
where
    F: Future<Output = io::Result<T>>,
{
    let try_at = |address: SocketAddr| {
        let made = attempt(address);
        async move { made.await.map(|made| (made, address)) }
    };
    let mut attempts: FuturesUnordered<_> = known.into_iter().map(try_at).collect();
    let mut failure: Option<io::Error> = None;
    let mut waiting: VecDeque<SocketAddr> = VecDeque::new();
    let mut resolving = true;
    tokio::pin!(resolved);
    let pause = sleep(APART);
    tokio::pin!(pause);
    loop {
        if attempts.is_empty() && !resolving {
            let Some(address) = waiting.pop_front() else { break };
            attempts.push(try_at(address));
            pause.set(sleep(APART));
        }
        tokio::select! {
            Some(made) = attempts.next() => match made {
                Ok(made) => return Ok(made),
                Err(error) => failure = failure.or(Some(error)),
            },
            addresses = &mut resolved, if resolving => {
                resolving = false;
                match addresses {
                    Ok(addresses) => {
                        waiting = in_turn(addresses.into_iter().filter(|address| Some(*address) != known).collect());
                    }
                    Err(error) => failure = failure.or(Some(error)),
                }
            }
            () = &mut pause, if !waiting.is_empty() => {
                attempts.extend(waiting.pop_front().map(try_at));
                pause.set(sleep(APART));
            }
        }
    }
    Err(failure.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address")))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::time::Instant;

    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// What a host does with an attempt.
    #[derive(Clone, Copy)]
    enum Host {
        Answers(u64),
        Refuses,
        Swallows,
    }

    /// Who was tried when, in milliseconds, and what came of it.
    async fn raced(
        known: Option<&str>,
        resolved: io::Result<Vec<&str>>,
        host: impl Fn(&str) -> Host,
    ) -> (Result<String, io::ErrorKind>, Vec<(u64, String)>) {
        let began = Instant::now();
        let tried = Mutex::new(Vec::new());
        let attempt = |at: SocketAddr| {
            let name = at.ip().to_string();
            tried.lock().unwrap().push((u64::try_from(began.elapsed().as_millis()).unwrap(), name.clone()));
            let host = host(&name);
            async move {
                match host {
                    Host::Answers(after) => {
                        sleep(Duration::from_millis(after)).await;
                        Ok(())
                    }
                    Host::Refuses => Err(io::ErrorKind::ConnectionRefused.into()),
                    Host::Swallows => std::future::pending().await,
                }
            }
        };
        let resolved = resolved.map(|all| all.into_iter().map(address).collect());
        let made = first(known.map(address), async { resolved }, attempt).await;
        (made.map(|((), at)| at.ip().to_string()).map_err(|error| error.kind()), tried.into_inner().unwrap())
    }

    fn at(tried: &[(u64, &str)]) -> Vec<(u64, String)> {
        tried.iter().map(|(at, name)| (*at, (*name).to_owned())).collect()
    }

    const FOUR: [&str; 4] = ["10.0.0.1:1", "10.0.0.2:1", "[fd00::1]:1", "[fd00::2]:1"];

    #[tokio::test(start_paused = true)]
    async fn one_that_swallows_holds_up_nobody() {
        let host = |name: &str| if name == "fd00::1" { Host::Answers(10) } else { Host::Swallows };
        let (made, tried) = raced(None, Ok(FOUR.to_vec()), host).await;
        assert_eq!(made, Ok("fd00::1".to_owned()));
        assert_eq!(tried, at(&[(0, "10.0.0.1"), (250, "fd00::1")]));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_refuses_is_followed_at_once() {
        let host = |name: &str| if name == "fd00::2" { Host::Answers(0) } else { Host::Refuses };
        let (made, tried) = raced(None, Ok(FOUR.to_vec()), host).await;
        assert_eq!(made, Ok("fd00::2".to_owned()));
        assert_eq!(tried, at(&[(0, "10.0.0.1"), (0, "fd00::1"), (0, "10.0.0.2"), (0, "fd00::2")]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_first_still_wins_if_it_is_first() {
        let host = |name: &str| if name == "10.0.0.1" { Host::Answers(300) } else { Host::Answers(200) };
        let (made, tried) = raced(None, Ok(FOUR.to_vec()), host).await;
        assert_eq!(made, Ok("10.0.0.1".to_owned()));
        assert_eq!(tried.len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_good_one_comes_first_and_not_twice() {
        let host = |name: &str| if name == "10.0.0.2" { Host::Answers(0) } else { Host::Swallows };
        let (made, tried) = raced(Some("10.0.0.2:1"), Ok(FOUR.to_vec()), host).await;
        assert_eq!((made, tried), (Ok("10.0.0.2".to_owned()), at(&[(0, "10.0.0.2")])));
        let host = |name: &str| if name == "10.0.0.1" { Host::Answers(0) } else { Host::Swallows };
        let (made, tried) = raced(Some("10.0.0.2:1"), Ok(FOUR.to_vec()), host).await;
        assert_eq!((made, tried), (Ok("10.0.0.1".to_owned()), at(&[(0, "10.0.0.2"), (250, "10.0.0.1")])));
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_service_that_fails_costs_only_what_is_not_known() {
        let broken = || Err(io::ErrorKind::TimedOut.into());
        let (made, _) = raced(Some("10.0.0.2:1"), broken(), |_| Host::Answers(5)).await;
        assert_eq!(made, Ok("10.0.0.2".to_owned()));
        assert_eq!(raced(None, broken(), |_| Host::Answers(5)).await, (Err(io::ErrorKind::TimedOut), vec![]));
        assert_eq!(raced(None, Ok(vec![]), |_| Host::Answers(5)).await, (Err(io::ErrorKind::NotFound), vec![]));
        let (made, tried) = raced(None, Ok(FOUR.to_vec()), |_| Host::Refuses).await;
        assert_eq!((made, tried.len()), (Err(io::ErrorKind::ConnectionRefused), 4));
    }
}
