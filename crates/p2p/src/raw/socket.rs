//! Moving bytes between a connection and the runs of a cache, and waiting for a connection.
//!
//! The library's calls for this take slices, which must not exist over memory that others write.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::LocalRanges;

/// Bytes of one call: of the buffer in front, of the ranges, of the buffer behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    pub(crate) front: usize,
    pub(crate) ranges: usize,
    pub(crate) back: usize,
}

impl Moved {
    fn of(bytes: usize, front: usize, ranges: usize) -> Self {
        let in_front = bytes.min(front);
        let in_ranges = (bytes - in_front).min(ranges);
        Self {
            front: in_front,
            ranges: in_ranges,
            back: bytes - in_front - in_ranges,
        }
    }

    /// All of them.
    pub(crate) fn total(self) -> usize {
        self.front + self.ranges + self.back
    }
}

/// Receives what is there into `front`, then `ranges`, then `back`. `None`: nothing is there yet. No bytes at all: the
/// peer has closed.
pub(crate) fn receive(
    socket: &TcpStream,
    front: &mut [u8],
    ranges: &mut LocalRanges,
    back: &mut [u8],
) -> io::Result<Option<Moved>> {
    let (front, back) = (range_of(front), range_of(back));
    let in_ranges = ranges.len_bytes();
    let list = ranges.list_with(front, back);
    let result = retry(|| {
        let mut message = message(list);
        // SAFETY: the ranges are buffers borrowed for writing and runs of a cache that `ranges` keeps alive, which may
        // be written and to which nobody has references.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
    });
    finish(ranges, result, front, in_ranges, back)
}

/// Sends as much of `front` and then of `ranges` as goes without waiting. `None`: nothing does.
pub(crate) fn send(socket: &TcpStream, front: &[u8], ranges: &mut LocalRanges) -> io::Result<Option<Moved>> {
    let front = libc::iovec {
        iov_base: front.as_ptr().cast_mut().cast(),
        iov_len: front.len(),
    };
    let back = range_of(&mut []);
    let in_ranges = ranges.len_bytes();
    let list = ranges.list_with(front, back);
    let result = retry(|| {
        let message = message(list);
        // SAFETY: the kernel only reads the ranges: a borrowed buffer and runs of a cache that `ranges` keeps alive.
        unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        }
    });
    finish(ranges, result, front, in_ranges, back)
}

fn range_of(buffer: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    }
}

fn message(list: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: a header of zeroes is one without address, ranges and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_mut_ptr();
    message.msg_iovlen = list.len() as _;
    message
}

fn finish(
    ranges: &mut LocalRanges,
    result: io::Result<usize>,
    front: libc::iovec,
    in_ranges: usize,
    back: libc::iovec,
) -> io::Result<Option<Moved>> {
    ranges.drop_back(back);
    match result {
        Ok(bytes) => {
            let moved = Moved::of(bytes, front.iov_len, in_ranges);
            ranges.advance(moved.ranges);
            Ok(Some(moved))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interest {
    Readable,
    Writable,
}

/// Waits until a call will not say that it would wait, an error included, or until `most` has passed.
pub(crate) fn wait(socket: &TcpStream, interest: Interest, most: Duration) -> io::Result<()> {
    let mut descriptor = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: match interest {
            Interest::Readable => libc::POLLIN,
            Interest::Writable => libc::POLLOUT,
        },
        revents: 0,
    };
    // Rounded up: a wait of no time at all would spin until the deadline.
    let most_ms = most.as_micros().div_ceil(1000).min(60_000) as libc::c_int;
    // SAFETY: one descriptor, which is borrowed.
    if unsafe { libc::poll(&mut descriptor, 1, most_ms) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(())
}

/// Lets the kernel notice a peer whose machine is gone.
pub(crate) fn keep_alive(socket: &TcpStream) -> io::Result<()> {
    for (level, name, value) in [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1 as libc::c_int),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 10),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 5),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3),
    ] {
        set_option(socket, level, name, &value.to_ne_bytes())?;
    }
    Ok(())
}

/// For a connection within this machine: lets the kernel send as soon as there is room. Machines whose default is BBR
/// pace their connections, also where there is no way that could be full.
pub(crate) fn send_unpaced(socket: &TcpStream) {
    // Every kernel has Reno and lets every user choose it; without it the connection is only slower.
    let _ = set_option(socket, libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"reno");
}

fn set_option(socket: &TcpStream, level: libc::c_int, name: libc::c_int, value: &[u8]) -> io::Result<()> {
    // SAFETY: the option's value is borrowed and has this length.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
