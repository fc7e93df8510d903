//! A DEALER's connection to one ROUTER. Every wait has an end and can be cut short.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::zmtp::{self, Incoming, Reader, ZmtpError};

/// When the system gives a peer up that vanished without a word: half a minute, for which a proxy has long dropped us.
const USER_TIMEOUT_MS: u32 = 30_000;
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Pieces read in one go. A peer that floods us is listened to again after the next look at what else there is.
const READS_MAX: usize = 16;

pub(super) struct Dealer {
    stream: TcpStream,
    reader: Reader,
}

/// Why a connection is of no use any more. Reads as the end of "no ping to the proxy: ...".
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("told to stop")]
    Stopped,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0} took too long")]
    Late(&'static str),
    #[error("{0}")]
    Peer(#[from] ZmtpError),
}

impl Dealer {
    /// Connects and shakes hands until `deadline`.
    pub(super) fn connect(
        address: SocketAddr,
        identity: &[u8],
        stop: &UnixStream,
        deadline: Instant,
    ) -> Result<Self, Failure> {
        let family = if address.is_ipv4() {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(io::Error::from)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {}
            Err(rustix::io::Errno::INPROGRESS) => {
                if !wait(stop, Some((&socket, PollFlags::OUT)), deadline)? {
                    return Err(Failure::Late("connecting"));
                }
                sockopt::socket_error(&socket)
                    .map_err(io::Error::from)?
                    .map_err(io::Error::from)?;
            }
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true)?;
        keep_alive(&stream).map_err(io::Error::from)?;
        let mut dealer = Self {
            stream,
            reader: Reader::default(),
        };
        let hello = [&zmtp::GREETING[..], &zmtp::ready(identity)].concat();
        dealer.send(&hello, stop, deadline)?;
        loop {
            if !wait(stop, Some((&dealer.stream, PollFlags::IN)), deadline)? {
                return Err(Failure::Late("the handshake"));
            }
            if dealer.take(stop, deadline)? {
                return Ok(dealer);
            }
        }
    }

    /// Hands all of `bytes` to the system until `deadline`.
    pub(super) fn send(
        &mut self,
        mut bytes: &[u8],
        stop: &UnixStream,
        deadline: Instant,
    ) -> Result<(), Failure> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !wait(stop, Some((&self.stream, PollFlags::OUT)), deadline)? {
                        return Err(Failure::Late("sending"));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Until `until`: answers heartbeats and drops what else comes, so that the end of the connection is seen at once.
    pub(super) fn listen(&mut self, stop: &UnixStream, until: Instant) -> Result<(), Failure> {
        while wait(stop, Some((&self.stream, PollFlags::IN)), until)? {
            self.take(stop, until.max(Instant::now() + super::PATIENCE))?;
            if Instant::now() >= until {
                break;
            }
        }
        Ok(())
    }

    /// Takes what has come, and tells whether the handshake was completed by it.
    fn take(&mut self, stop: &UnixStream, deadline: Instant) -> Result<bool, Failure> {
        let mut buffer = [0; 4096];
        let mut incoming = Vec::new();
        for _ in 0..READS_MAX {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(count) => self.reader.feed(&buffer[..count], &mut incoming)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        let mut is_ready = false;
        for incoming in incoming {
            match incoming {
                Incoming::Ready => is_ready = true,
                Incoming::Ping(context) => self.send(&zmtp::pong(&context), stop, deadline)?,
            }
        }
        Ok(is_ready)
    }
}

fn keep_alive(stream: &TcpStream) -> rustix::io::Result<()> {
    sockopt::set_tcp_user_timeout(stream, USER_TIMEOUT_MS)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE)
}

/// Waits until `until`.
pub(super) fn pause(stop: &UnixStream, until: Instant) -> Result<(), Failure> {
    while wait(stop, None::<(&UnixStream, PollFlags)>, until)? {}
    Ok(())
}

/// Waits for `socket` until `until`; false when that has passed.
fn wait(stop: &UnixStream, socket: Option<(&impl AsFd, PollFlags)>, until: Instant) -> Result<bool, Failure> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_error| Failure::Late("a wait"))?;
        let mut watched = vec![PollFd::new(stop, PollFlags::IN)];
        if let Some((socket, events)) = &socket {
            watched.push(PollFd::new(*socket, *events));
        }
        match poll(&mut watched, Some(&left)) {
            Ok(0) => return Ok(false),
            Ok(_) if !watched[0].revents().is_empty() => return Err(Failure::Stopped),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
}
