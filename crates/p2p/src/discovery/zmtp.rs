//! As much of ZMTP 3.0 (RFC 23) as a DEALER without security needs to send: greeting, READY, message frames, and the
//! answer to a heartbeat. No sockets here. A crate for all of ZMQ would bring a runtime into every worker for forty bytes
//! every three seconds.

/// Signature, version 3.0, mechanism NULL, not a server, filler.
pub(super) const GREETING: [u8; GREETING_BYTES] = {
    let mut greeting = [0; GREETING_BYTES];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    let mut at = 0;
    while at < MECHANISM.len() {
        greeting[12 + at] = MECHANISM[at];
        at += 1;
    }
    greeting
};

const GREETING_BYTES: usize = 64;
const MECHANISM: &[u8; 4] = b"NULL";

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Commands up to this length are read, longer ones and all messages are skipped. libzmq's READY has some 40 bytes.
const COMMAND_BYTES_MAX: usize = 1024;

/// Types of sockets that a DEALER may talk to.
const PARTNERS: [&[u8]; 3] = [b"ROUTER", b"DEALER", b"REP"];

/// What a peer sent that matters here.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// The handshake is complete.
    Ready,
    /// A heartbeat; its context is to be sent back.
    Ping(Vec<u8>),
}

/// Why a peer cannot be talked to.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ZmtpError {
    #[error("it does not speak ZMTP 3")]
    NotZmtp,
    #[error("it wants the mechanism {0}, only NULL is spoken here")]
    Mechanism(String),
    #[error("its socket is a {0}, a ROUTER is needed")]
    SocketType(String),
    #[error("it refuses: {0}")]
    Refused(String),
    #[error("it sent a malformed frame")]
    Malformed,
}

/// Takes a peer's bytes apart, however they are cut. Holds one command at most.
#[derive(Default)]
pub(super) struct Reader {
    greeted: bool,
    is_ready: bool,
    /// The greeting, or the frame header and the command that is being read.
    held: Vec<u8>,
    /// What is left of a frame that is skipped.
    skip_bytes: u64,
}

impl Reader {
    /// Takes the next bytes; what they complete goes to `out`.
    pub(super) fn feed(&mut self, mut bytes: &[u8], out: &mut Vec<Incoming>) -> Result<(), ZmtpError> {
        while !bytes.is_empty() {
            if self.skip_bytes > 0 {
                let skipped =
                    usize::try_from(self.skip_bytes).map_or(bytes.len(), |left| left.min(bytes.len()));
                self.skip_bytes -= skipped as u64;
                bytes = &bytes[skipped..];
                continue;
            }
            let wanted = self.wanted_bytes()?;
            let taken = (wanted - self.held.len()).min(bytes.len());
            self.held.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.held.len() == wanted {
                self.step(out)?;
            }
        }
        Ok(())
    }

    /// Up to which length `held` has to grow for the next step.
    fn wanted_bytes(&self) -> Result<usize, ZmtpError> {
        if !self.greeted {
            return Ok(GREETING_BYTES);
        }
        Ok(match self.header()? {
            None => header_bytes(self.held.first().copied()),
            Some((header, length)) => header + length,
        })
    }

    /// Of a complete frame header: its own length, and that of the command behind it.
    fn header(&self) -> Result<Option<(usize, usize)>, ZmtpError> {
        let header = header_bytes(self.held.first().copied());
        if self.held.len() < header {
            return Ok(None);
        }
        let length = self.held[1..header]
            .iter()
            .fold(0, |length: u64, byte| length << 8 | u64::from(*byte));
        let length = usize::try_from(length).map_err(|_error| ZmtpError::Malformed)?;
        Ok(Some((header, length)))
    }

    fn step(&mut self, out: &mut Vec<Incoming>) -> Result<(), ZmtpError> {
        if !self.greeted {
            check_greeting(&self.held)?;
            self.greeted = true;
            self.held.clear();
            return Ok(());
        }
        let Some((header, length)) = self.header()? else {
            // The flags only: they tell how long the header is.
            return check_flags(self.held[0]);
        };
        let flags = self.held[0];
        check_flags(flags)?;
        let is_read = flags & COMMAND != 0 && length <= COMMAND_BYTES_MAX;
        if !is_read {
            // Nothing is expected before the handshake is over.
            if !self.is_ready {
                return Err(ZmtpError::Malformed);
            }
            self.skip_bytes = length as u64;
        } else if self.held.len() < header + length {
            return Ok(());
        } else if let Some(incoming) = command(&self.held[header..])? {
            self.is_ready |= incoming == Incoming::Ready;
            out.push(incoming);
        }
        self.held.clear();
        Ok(())
    }
}

fn header_bytes(flags: Option<u8>) -> usize {
    match flags {
        None => 1,
        Some(flags) if flags & LONG != 0 => 9,
        Some(_) => 2,
    }
}

fn check_flags(flags: u8) -> Result<(), ZmtpError> {
    let known = flags & !(MORE | LONG | COMMAND) == 0;
    // A command is never in parts.
    (known && flags & (MORE | COMMAND) != MORE | COMMAND)
        .then_some(())
        .ok_or(ZmtpError::Malformed)
}

fn check_greeting(greeting: &[u8]) -> Result<(), ZmtpError> {
    if greeting[0] != 0xff || greeting[9] & 1 == 0 || greeting[10] < 3 {
        return Err(ZmtpError::NotZmtp);
    }
    let mechanism = greeting[12..32]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    if mechanism != MECHANISM {
        return Err(ZmtpError::Mechanism(shown(mechanism)));
    }
    Ok(())
}

fn command(body: &[u8]) -> Result<Option<Incoming>, ZmtpError> {
    let (name, rest) = counted::<1>(body).ok_or(ZmtpError::Malformed)?;
    match name {
        b"READY" => {
            let partner = socket_type(rest).ok_or(ZmtpError::Malformed)?;
            if PARTNERS.contains(&partner) {
                Ok(Some(Incoming::Ready))
            } else {
                Err(ZmtpError::SocketType(shown(partner)))
            }
        }
        b"ERROR" => {
            let reason = counted::<1>(rest).map_or(&[][..], |(reason, _)| reason);
            Err(ZmtpError::Refused(shown(reason)))
        }
        // Two bytes tell how long the peer waits, which a single answer need not know.
        b"PING" => Ok(rest.get(2..).map(|context| Incoming::Ping(context.to_vec()))),
        _ => Ok(None),
    }
}

/// The value of the property Socket-Type. Names of properties are compared without case.
fn socket_type(mut properties: &[u8]) -> Option<&[u8]> {
    while !properties.is_empty() {
        let (name, rest) = counted::<1>(properties)?;
        let (value, rest) = counted::<4>(rest)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Some(value);
        }
        properties = rest;
    }
    None
}

/// What stands behind its length in `LENGTH_BYTES` bytes, and the rest.
fn counted<const LENGTH_BYTES: usize>(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_at_checked(LENGTH_BYTES)?;
    let length = length
        .iter()
        .fold(0, |length: usize, byte| length << 8 | usize::from(*byte));
    rest.split_at_checked(length)
}

fn shown(bytes: &[u8]) -> String {
    bytes[..bytes.len().min(64)].escape_ascii().to_string()
}

/// The command that ends the handshake of a DEALER with this identity.
pub(super) fn ready(identity: &[u8]) -> Vec<u8> {
    let mut body = b"\x05READY".to_vec();
    for (name, value) in [(&b"Socket-Type"[..], &b"DEALER"[..]), (b"Identity", identity)] {
        body.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        body.extend_from_slice(name);
        body.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
        body.extend_from_slice(value);
    }
    frame(COMMAND, &body)
}

/// A message of one part.
pub(super) fn message(body: &[u8]) -> Vec<u8> {
    frame(0, body)
}

/// The answer to a heartbeat.
pub(super) fn pong(context: &[u8]) -> Vec<u8> {
    frame(COMMAND, &[b"\x04PONG", context].concat())
}

fn frame(flags: u8, body: &[u8]) -> Vec<u8> {
    let mut frame = match u8::try_from(body.len()) {
        Ok(length) => vec![flags, length],
        Err(_long) => {
            let mut frame = vec![flags | LONG];
            frame.extend_from_slice(&(body.len() as u64).to_be_bytes());
            frame
        }
    };
    frame.extend_from_slice(body);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTER_READY: &[u8] =
        b"\x04\x29\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER\x08Identity\x00\x00\x00\x00";

    fn read(pieces: &[&[u8]]) -> Result<Vec<Incoming>, ZmtpError> {
        let (mut reader, mut out) = (Reader::default(), Vec::new());
        for piece in pieces {
            reader.feed(piece, &mut out)?;
        }
        Ok(out)
    }

    #[test]
    fn a_routers_bytes_are_understood_however_they_are_cut() {
        let long_message = frame(0, &[7; 300]);
        let long_command = frame(COMMAND, &[b"\x05OTHER".as_slice(), &[0; 2000]].concat());
        let all = [
            &GREETING,
            ROUTER_READY,
            &frame(MORE, b"\x05READY"),
            &long_message,
            &frame(0, b""),
            &long_command,
            b"\x04\x0a\x04PING\x00\x0aabc",
        ]
        .concat();
        let expected = vec![Incoming::Ready, Incoming::Ping(b"abc".to_vec())];
        assert_eq!(read(&[&all]).unwrap(), expected);
        for size in [1, 2, 3, 7, 64, 65] {
            let pieces: Vec<&[u8]> = all.chunks(size).collect();
            assert_eq!(read(&pieces).unwrap(), expected, "{size}");
        }
    }

    #[test]
    fn peers_that_cannot_be_talked_to_are_named() {
        let greeting = |at: usize, bytes: &[u8]| {
            let mut greeting = GREETING;
            greeting[at..at + bytes.len()].copy_from_slice(bytes);
            greeting
        };
        let after_greeting = |bytes: &[u8]| read(&[&GREETING, bytes]);
        let publisher = b"\x04\x19\x05READY\x0bsocket-type\x00\x00\x00\x03PUB";
        for (result, error) in [
            (read(&[&[b'H'; 64]]), ZmtpError::NotZmtp),
            (read(&[&greeting(10, &[2])]), ZmtpError::NotZmtp),
            (
                read(&[&greeting(12, b"CURVE")]),
                ZmtpError::Mechanism("CURVE".to_owned()),
            ),
            (after_greeting(publisher), ZmtpError::SocketType("PUB".to_owned())),
            (
                after_greeting(b"\x04\x09\x05ERROR\x02no"),
                ZmtpError::Refused("no".to_owned()),
            ),
            (after_greeting(b"\x08"), ZmtpError::Malformed),
            (after_greeting(b"\x05\x01x"), ZmtpError::Malformed),
            (after_greeting(b"\x00\x01x"), ZmtpError::Malformed),
            (after_greeting(b"\x04\x07\x05READY\x40"), ZmtpError::Malformed),
            (after_greeting(b"\x04\x00"), ZmtpError::Malformed),
            (after_greeting(&frame(COMMAND, &[5; 2000])), ZmtpError::Malformed),
        ] {
            assert_eq!(result, Err(error));
        }
    }

    #[test]
    fn what_a_peer_sends_is_not_kept() {
        let (mut reader, mut out) = (Reader::default(), Vec::new());
        reader
            .feed(&[&GREETING[..], ROUTER_READY].concat(), &mut out)
            .unwrap();
        // A message that says it is as long as it can be.
        reader
            .feed(b"\x02\x7f\xff\xff\xff\xff\xff\xff\xff", &mut out)
            .unwrap();
        for _ in 0..100 {
            reader.feed(&[0; 4096], &mut out).unwrap();
        }
        assert!(reader.held.capacity() <= 4096, "{}", reader.held.capacity());
        assert_eq!(out, [Incoming::Ready]);
    }

    #[test]
    fn identities_and_messages_longer_than_a_byte_can_tell_have_a_long_header() {
        assert_eq!(message(b"ab"), b"\x00\x02ab");
        assert_eq!(message(&[1; 256])[..9], *b"\x02\x00\x00\x00\x00\x00\x00\x01\x00");
        assert_eq!(ready(&[b'x'; 255])[0], COMMAND | LONG);
        let expected =
            b"\x04\x2e\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x05h:123";
        assert_eq!(ready(b"h:123"), expected);
        assert_eq!(pong(b"ab"), b"\x04\x07\x04PONGab");
    }
}
