//! Frames: a preamble that tells whether the other side speaks this protocol, then messages with their length in front.

use super::message::{Message, VERSION};

/// Longest body of a frame. The longest message is a HELLO, whose runs are at most [`MAX_TOTAL_RUNS`] pairs of numbers of
/// at most ten bytes each; they have half of that in a cache that fits into memory.
///
/// [`MAX_TOTAL_RUNS`]: crate::lanes::MAX_TOTAL_RUNS
pub const FRAME_BYTES_MAX: usize = 4 << 20;

/// Longest body before a peer has shown that it knows the secret: an Open is shorter.
const STRANGER_BYTES_MAX: usize = 4 << 10;

/// Longest body of a peer that connected here and showed that it knows the secret, if there is one: those pull, and say
/// little. The longest is a HELLO with [`FACTS_MAX`](super::FACTS_MAX) facts.
pub const PULLER_BYTES_MAX: usize = 128 << 10;

/// What was given out stays in the buffer until it is so much.
const USED_BYTES_MAX: usize = 64 << 10;

/// First bytes of a connection, in both directions; two bytes of version follow.
const MAGIC: [u8; 6] = *b"kvlane";
const PREAMBLE_BYTES: usize = MAGIC.len() + 2;
const LENGTH_BYTES: usize = 4;

/// Why the bytes of a connection are not this protocol's. Each ends the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Something else speaks on that port.
    #[error("the first bytes are {0:02x?}, which is not kvlane's protocol")]
    NotKvlane(Vec<u8>),
    /// Another version.
    #[error(
        "the peer speaks version {found} of the protocol, allowed: {VERSION}; both servers need the same kvlane"
    )]
    Version {
        /// The peer's.
        found: u16,
    },
    /// A length that no message has.
    #[error("a frame of {found} bytes, allowed here: 1 to {limit}")]
    Length {
        /// The frame's.
        found: usize,
        /// The most.
        limit: usize,
    },
    /// A body that is no message.
    #[error("a frame of {bytes} bytes that is no message: {reason}")]
    Body {
        /// Length of the body.
        bytes: usize,
        /// What the decoder says.
        reason: String,
    },
}

fn preamble() -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
    bytes[MAGIC.len()..].copy_from_slice(&VERSION.to_le_bytes());
    bytes
}

/// Appends the frame of a message.
///
/// # Panics
/// If the message does not fit into a frame; the lists in messages are bounded by their makers.
pub fn encode(message: &Message, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    bytes.extend_from_slice(&[0; LENGTH_BYTES]);
    let body = postcard::to_allocvec(message).expect("messages have nothing that cannot be encoded");
    assert!(body.len() <= FRAME_BYTES_MAX, "a message of {} bytes", body.len());
    bytes.extend_from_slice(&body);
    bytes[start..start + LENGTH_BYTES].copy_from_slice(&(body.len() as u32).to_le_bytes());
}

/// Takes bytes as they arrive and gives messages. Holds at most one frame and what arrived with it.
#[derive(Debug)]
pub struct Frames {
    bytes: Vec<u8>,
    /// Bytes in front that were given out already.
    used: usize,
    is_open: bool,
    /// Longest body that is waited for.
    limit_bytes: usize,
}

impl Default for Frames {
    fn default() -> Self {
        Self::new()
    }
}

impl Frames {
    /// Before the first byte of a peer that is known.
    pub fn new() -> Self {
        Self {
            bytes: Vec::new(),
            used: 0,
            is_open: false,
            limit_bytes: FRAME_BYTES_MAX,
        }
    }

    /// Before the first byte of a stranger, who gets no more memory than a handshake needs until
    /// [`trust`](Self::trust) is called.
    pub fn of_stranger() -> Self {
        Self {
            limit_bytes: STRANGER_BYTES_MAX,
            ..Self::new()
        }
    }

    /// The peer has shown who it is, and may send bodies of at most `limit_bytes`.
    pub fn trust(&mut self, limit_bytes: usize) {
        self.limit_bytes = limit_bytes.min(FRAME_BYTES_MAX);
    }

    /// The bytes that open a connection, in both directions.
    pub fn preamble() -> [u8; PREAMBLE_BYTES] {
        preamble()
    }

    /// Adds what arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.used == self.bytes.len() {
            self.bytes.clear();
            self.used = 0;
        } else if self.used > USED_BYTES_MAX {
            self.bytes.drain(..self.used);
            self.used = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, none if more bytes are needed. After an error the connection is of no use.
    pub fn next_message(&mut self) -> Result<Option<Message>, FrameError> {
        if !self.is_open && !self.take_preamble()? {
            return Ok(None);
        }
        let rest = &self.bytes[self.used..];
        let Some((length, behind)) = rest.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        // Refused before anything of that size is waited for.
        let length = u32::from_le_bytes(*length) as usize;
        if length == 0 || length > self.limit_bytes {
            return Err(FrameError::Length {
                found: length,
                limit: self.limit_bytes,
            });
        }
        let Some(body) = behind.get(..length) else {
            return Ok(None);
        };
        let refused = |reason: &str| FrameError::Body {
            bytes: length,
            reason: reason.to_owned(),
        };
        let (message, left) =
            postcard::take_from_bytes::<Message>(body).map_err(|error| refused(&error.to_string()))?;
        if !left.is_empty() {
            return Err(refused("bytes are left over"));
        }
        if !message.texts_are_bounded() {
            return Err(refused("a text is too long"));
        }
        self.used += LENGTH_BYTES + length;
        Ok(Some(message))
    }

    /// Bytes that arrived behind the last message.
    pub fn into_rest(mut self) -> Vec<u8> {
        self.bytes.drain(..self.used);
        self.bytes
    }

    fn take_preamble(&mut self) -> Result<bool, FrameError> {
        let expected = preamble();
        let seen = &self.bytes[..self.bytes.len().min(PREAMBLE_BYTES)];
        let magic = seen.len().min(MAGIC.len());
        if seen[..magic] != expected[..magic] {
            return Err(FrameError::NotKvlane(seen.to_vec()));
        }
        let Some(version) = seen.get(MAGIC.len()..PREAMBLE_BYTES) else {
            return Ok(false);
        };
        let found = u16::from_le_bytes([version[0], version[1]]);
        if found != VERSION {
            return Err(FrameError::Version { found });
        }
        self.used = PREAMBLE_BYTES;
        self.is_open = true;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::key::{Prompt, TransferKey};
    use crate::proto::Progress;

    fn messages() -> Vec<Message> {
        let prompt = Prompt {
            tokens: 77,
            digest: [3; 32],
        };
        vec![
            Message::Ping,
            Message::Want {
                transfer: 9,
                key: TransferKey::new("a key").unwrap(),
                prompt,
                first_block: 2,
                block_count: 3,
                block_tokens: 16,
                readers: 1,
            },
            Message::Ready {
                transfer: 9,
                blocks: vec![5, u32::MAX],
                progress: Progress {
                    done_blocks: 1,
                    wave_blocks: 2,
                    wave_layers: 3,
                },
            },
            Message::Bye("done".to_owned()),
        ]
    }

    fn stream() -> Vec<u8> {
        let mut bytes = preamble().to_vec();
        messages().iter().for_each(|message| encode(message, &mut bytes));
        bytes
    }

    fn all(frames: &mut Frames) -> Vec<Message> {
        std::iter::from_fn(|| frames.next_message().unwrap()).collect()
    }

    #[test]
    fn messages_arrive_whole_however_the_bytes_are_cut() {
        let bytes = stream();
        for piece in [1, 2, 3, 7, 1000] {
            let mut frames = Frames::new();
            let mut seen = Vec::new();
            for part in bytes.chunks(piece) {
                frames.push(part);
                seen.append(&mut all(&mut frames));
            }
            assert_eq!(seen, messages(), "pieces of {piece}");
        }
    }

    #[test]
    fn bytes_behind_the_last_message_are_kept() {
        let mut frames = Frames::new();
        frames.push(&stream());
        frames.push(&[1, 2]);
        assert_eq!(all(&mut frames).len(), messages().len());
        assert_eq!(frames.into_rest(), [1, 2]);
    }

    #[test]
    fn another_protocol_and_another_version_are_told_apart() {
        let mut frames = Frames::new();
        frames.push(b"GET / HTTP/1.1");
        assert_eq!(
            frames.next_message(),
            Err(FrameError::NotKvlane(b"GET / HT".to_vec()))
        );
        let mut frames = Frames::new();
        frames.push(b"kvlane\x02\x01");
        assert_eq!(frames.next_message(), Err(FrameError::Version { found: 258 }));
        let mut frames = Frames::new();
        frames.push(b"kvl");
        assert_eq!(frames.next_message(), Ok(None));
        frames.push(b"x");
        assert!(frames.next_message().is_err());
    }

    #[test]
    fn a_length_that_no_message_has_is_refused_before_its_bytes_arrive() {
        for length in [0, FRAME_BYTES_MAX as u32 + 1, u32::MAX] {
            let mut frames = Frames::new();
            frames.push(&preamble());
            frames.push(&length.to_le_bytes());
            assert_eq!(
                frames.next_message(),
                Err(FrameError::Length {
                    found: length as usize,
                    limit: FRAME_BYTES_MAX
                })
            );
        }
    }

    #[test]
    fn a_stranger_gets_no_more_memory_than_a_handshake_needs() {
        let header = (STRANGER_BYTES_MAX as u32 + 1).to_le_bytes();
        let mut frames = Frames::of_stranger();
        frames.push(&preamble());
        frames.push(&header);
        assert!(matches!(frames.next_message(), Err(FrameError::Length { .. })));
        let mut frames = Frames::of_stranger();
        frames.trust(PULLER_BYTES_MAX);
        frames.push(&preamble());
        frames.push(&header);
        assert_eq!(frames.next_message(), Ok(None));
        let mut frames = Frames::of_stranger();
        frames.trust(PULLER_BYTES_MAX);
        frames.push(&preamble());
        frames.push(&(PULLER_BYTES_MAX as u32 + 1).to_le_bytes());
        assert!(matches!(frames.next_message(), Err(FrameError::Length { .. })));
    }

    #[test]
    fn left_over_bytes_and_texts_out_of_bounds_are_refused() {
        let mut body = postcard::to_allocvec(&Message::Ping).unwrap();
        body.push(0);
        let long = postcard::to_allocvec(&Message::Bye("x".repeat(1000))).unwrap();
        for body in [body, long] {
            let mut frames = Frames::new();
            frames.push(&preamble());
            frames.push(&(body.len() as u32).to_le_bytes());
            frames.push(&body);
            assert!(matches!(frames.next_message(), Err(FrameError::Body { .. })));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic_or_hoard(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let mut frames = Frames::new();
            frames.push(&preamble());
            frames.push(&bytes);
            while let Ok(Some(_)) = frames.next_message() {}
            prop_assert!(frames.bytes.capacity() < 3 * FRAME_BYTES_MAX);
        }
    }
}
