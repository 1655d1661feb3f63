//! The server's listener on the network: whoever holds connections open from one address stops no other address.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};

use anyhow::Result;
use e2e::testkit::node::Node;
use e2e::testkit::{Binaries, Server, ServerOptions};
use tokio::net::TcpSocket;

/// The beginning of a TLS record that announces more than ever comes.
const HALF_HELLO: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";

async fn connect(from: [u8; 4], server: &Server) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((from, 0)))?;
    let stream = socket.connect(SocketAddr::from(([127, 0, 0, 1], server.port))).await?;
    Ok(stream.into_std()?)
}

async fn attests(server: &Server, number: usize) -> Result<()> {
    let node = Node::by_token(server, number, &server.token(None)?).await?;
    node.connect().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_of_one_address_stop_no_other() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = Server::start(&Binaries::signet()?, folder.path(), &ServerOptions::default()).await?;
    let mut held = Vec::new();
    for number in 0..2000 {
        let Ok(mut stream) = connect([127, 0, 0, 1], &server).await else { continue };
        // A third says nothing, a third begins a handshake and stops, a third speaks something else.
        match number % 3 {
            0 => {}
            1 => drop(stream.write_all(HALF_HELLO)),
            _ => drop(stream.write_all(b"GET / HTTP/1.1\r\n")),
        }
        held.push(stream);
        if number % 500 == 499 {
            // `attests` comes from addresses of its own.
            attests(&server, number).await?;
        }
    }
    attests(&server, 1).await?;
    drop(held);
    attests(&server, 2).await
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_handshakes_from_many_addresses_stop_nobody() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = Server::start(&Binaries::signet()?, folder.path(), &ServerOptions::default()).await?;
    let mut held = Vec::new();
    for number in 0..1500_u16 {
        let [high, low] = number.to_be_bytes();
        let mut stream = connect([127, 200, high, low.max(1)], &server).await?;
        stream.set_nonblocking(false)?;
        stream.write_all(HALF_HELLO)?;
        held.push(stream);
    }
    attests(&server, 1).await?;
    // Byte by byte, each handshake goes on for as long as it is let.
    for stream in held.iter_mut().take(200) {
        let _ = stream.write_all(b"\x00");
    }
    attests(&server, 2).await
}
