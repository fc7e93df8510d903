//! The socket between the two ranks of a communicator.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::raw;
use crate::world::{INVALID_USAGE, REMOTE_ERROR, Random, SYSTEM_ERROR, World, lock};

/// Tells communicators apart.
pub(crate) type Token = [u8; 16];

/// An id's first bytes; the port and the token follow.
const MAGIC: [u8; 8] = *b"kvNcclSI";
const ID_BYTES: usize = 128;
/// Longest wait for the other rank.
const MEET_MAX: Duration = Duration::from_secs(60);
/// How often a waiting thread looks whether the communicator was aborted.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Bytes that are moved at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// Why something ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    Aborted,
    Failed(u32),
}

/// A name for a communicator, and where its rank 0 waits.
pub(crate) fn new_id() -> io::Result<[u8; ID_BYTES]> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    let token = raw::random();
    let mut id = [0; ID_BYTES];
    id[..8].copy_from_slice(&MAGIC);
    id[8..10].copy_from_slice(&port.to_le_bytes());
    id[16..32].copy_from_slice(&token);
    lock(&World::get().listeners).insert(token, listener);
    Ok(id)
}

/// What an id says; `None`: it is none.
pub(crate) fn read_id(id: &[u8; ID_BYTES]) -> Option<(u16, Token)> {
    let token = id[16..32].try_into().expect("sixteen bytes");
    (id[..8] == MAGIC).then(|| (u16::from_le_bytes([id[8], id[9]]), token))
}

/// A connection to the other rank. One thread uses it at a time.
#[derive(Debug)]
pub(crate) struct Link {
    stream: TcpStream,
    /// Messages sent and received so far.
    counts: Mutex<(u64, u64)>,
}

impl Link {
    /// Meets the other rank, until `is_aborted`.
    pub(crate) fn meet(rank: i32, id: (u16, Token), is_aborted: impl Fn() -> bool) -> Result<Self, Stopped> {
        let (port, token) = id;
        let until = Instant::now() + MEET_MAX;
        let stream = if rank == 0 {
            let listener = lock(&World::get().listeners).remove(&token);
            let listener = listener.ok_or_else(|| {
                let what = "rank 0 is not where the id was made, or its id was used before";
                Stopped::Failed(World::get().violated(what, INVALID_USAGE))
            })?;
            loop {
                if is_aborted() {
                    return Err(Stopped::Aborted);
                }
                match listener.accept() {
                    Ok((stream, _)) => break stream,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    Err(_) => return Err(Stopped::Failed(SYSTEM_ERROR)),
                }
            }
        } else {
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map_err(|_| Stopped::Failed(SYSTEM_ERROR))?
        };
        let prepared = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_nodelay(true))
            .and_then(|()| stream.set_read_timeout(Some(LOOK_EVERY)))
            .and_then(|()| stream.set_write_timeout(Some(LOOK_EVERY)));
        prepared.map_err(|_| Stopped::Failed(SYSTEM_ERROR))?;
        let link = Self {
            stream,
            counts: Mutex::default(),
        };
        let version = World::get().settings.version;
        let mut hello = [0; 24];
        hello[..16].copy_from_slice(&token);
        hello[16..20].copy_from_slice(&version.to_le_bytes());
        hello[20..].copy_from_slice(&rank.to_le_bytes());
        link.write(&hello, &is_aborted)?;
        let mut theirs = [0; 24];
        link.read(&mut theirs, &is_aborted)?;
        // As NCCL: all ranks have one version.
        let fits = theirs[..20] == hello[..20] && theirs[20..] != hello[20..];
        if fits {
            Ok(link)
        } else {
            Err(Stopped::Failed(INVALID_USAGE))
        }
    }

    /// Sends what is at an address.
    pub(crate) fn send(
        &self,
        address: usize,
        len: usize,
        random: &mut Random,
        is_aborted: impl Fn() -> bool,
    ) -> Result<(), Stopped> {
        let number = {
            let mut counts = lock(&self.counts);
            counts.0 += 1;
            counts.0
        };
        self.write(&head(number, len), &is_aborted)?;
        let mut bytes = vec![0; len.min(CHUNK_BYTES)];
        let mut done = 0;
        while done < len {
            random.dawdle(16);
            let chunk = &mut bytes[..(len - done).min(CHUNK_BYTES)];
            raw::read_memory(address + done, chunk).map_err(Stopped::Failed)?;
            self.write(chunk, &is_aborted)?;
            done += chunk.len();
        }
        Ok(())
    }

    /// Receives what the other rank sends next, to an address.
    pub(crate) fn receive(
        &self,
        address: usize,
        len: usize,
        random: &mut Random,
        is_aborted: impl Fn() -> bool,
    ) -> Result<(), Stopped> {
        let number = {
            let mut counts = lock(&self.counts);
            counts.1 += 1;
            counts.1
        };
        let mut theirs = [0; 16];
        self.read(&mut theirs, &is_aborted)?;
        if theirs != head(number, len) {
            let what = format!("receive {number} of {len} bytes, for which the other rank says {theirs:?}");
            return Err(Stopped::Failed(World::get().violated(&what, INVALID_USAGE)));
        }
        let mut bytes = vec![0; len.min(CHUNK_BYTES)];
        let mut done = 0;
        while done < len {
            random.dawdle(16);
            let chunk = &mut bytes[..(len - done).min(CHUNK_BYTES)];
            self.read(chunk, &is_aborted)?;
            raw::write_memory(address + done, chunk).map_err(Stopped::Failed)?;
            done += chunk.len();
        }
        Ok(())
    }

    /// The other rank sees the end.
    pub(crate) fn close(&self) {
        // Fails only where the connection is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn write(&self, bytes: &[u8], is_aborted: impl Fn() -> bool) -> Result<(), Stopped> {
        let mut done = 0;
        while done < bytes.len() {
            if is_aborted() {
                return Err(Stopped::Aborted);
            }
            match (&self.stream).write(&bytes[done..]) {
                Ok(count) => done += count,
                Err(error) if is_short(&error) => {}
                Err(_) => return Err(Stopped::Failed(REMOTE_ERROR)),
            }
        }
        Ok(())
    }

    fn read(&self, bytes: &mut [u8], is_aborted: impl Fn() -> bool) -> Result<(), Stopped> {
        let mut done = 0;
        while done < bytes.len() {
            if is_aborted() {
                return Err(Stopped::Aborted);
            }
            match (&self.stream).read(&mut bytes[done..]) {
                Ok(0) => return Err(Stopped::Failed(REMOTE_ERROR)),
                Ok(count) => done += count,
                Err(error) if is_short(&error) => {}
                Err(_) => return Err(Stopped::Failed(REMOTE_ERROR)),
            }
        }
        Ok(())
    }
}

fn head(number: u64, len: usize) -> [u8; 16] {
    let mut head = [0; 16];
    head[..8].copy_from_slice(&number.to_le_bytes());
    head[8..].copy_from_slice(&(len as u64).to_le_bytes());
    head
}

fn is_short(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}
