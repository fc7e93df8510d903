//! Looks at a data connection while something else is waited for. Nothing is read from it.

use std::net::TcpStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};

use super::wire::{ANSWER_BYTES, Answer};

/// Whether the peer has closed the connection or is gone, whatever is still to be read. Waits at most `most` for that.
pub(super) fn is_hung_up(socket: &TcpStream, most: Duration) -> bool {
    let mut watched = [PollFd::new(socket, PollFlags::RDHUP)];
    let most = Timespec {
        tv_sec: most.as_secs() as i64,
        tv_nsec: most.subsec_nanos().into(),
    };
    match poll(&mut watched, Some(&most)) {
        Ok(_) => watched[0]
            .revents()
            .intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR),
        // Interrupted: the caller looks again.
        Err(_) => false,
    }
}

/// Whether the next answer is there and says that the peer does not take part.
pub(super) fn is_refused(socket: &TcpStream) -> bool {
    let mut head = [0; ANSWER_BYTES];
    match recv(socket, &mut head, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, ANSWER_BYTES)) => !matches!(Answer::decode(&head), Ok(Answer::Joined)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn a_peer_that_has_closed_is_seen_behind_bytes_that_nobody_has_read() {
        let (near, mut far) = pair();
        assert!(!is_hung_up(&near, Duration::ZERO));
        far.write_all(b"some bytes").unwrap();
        assert!(!is_hung_up(&near, Duration::from_millis(20)));
        drop(far);
        assert!(is_hung_up(&near, Duration::from_secs(10)));
    }

    #[test]
    fn only_a_whole_answer_other_than_joined_is_a_refusal() {
        for (answer, expected) in [(Answer::Joined, false), (Answer::Refused { len_bytes: 3 }, true)] {
            let (near, mut far) = pair();
            assert!(!is_refused(&near));
            let bytes = answer.encode();
            far.write_all(&bytes[..9]).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            assert!(!is_refused(&near));
            far.write_all(&bytes[9..]).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(is_refused(&near), expected, "{answer:?}");
        }
    }
}
