use std::net::TcpStream;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::options::PeerOptions;
use super::*;
use crate::proto::{Channel, Hello, Identity, Link, Message, Role};

/// Cannot tell the time.
struct Broken {
    is_broken: bool,
    closed: Arc<AtomicU32>,
}

impl Machine for Broken {
    fn connected(&mut self, _: Instant, _: ConnectionId, _: &Link, _: Option<&PeerAddress>) {}

    fn receive(&mut self, _: Instant, _: ConnectionId, _: Message) -> Result<(), &'static str> {
        Ok(())
    }

    fn closed(&mut self, _: Instant, _: ConnectionId) {}

    fn close(&mut self, _: Instant) {
        self.closed.fetch_add(1, Ordering::Relaxed);
    }

    fn data_connection(&mut self, _: TcpStream, _: Vec<u8>, _: &Link) {}

    fn next_deadline(&self) -> Option<Instant> {
        self.is_broken.then(Instant::now)
    }

    fn tick(&mut self, _: Instant) {
        assert!(!self.is_broken, "an error in a machine");
    }

    fn next_message(&mut self) -> Option<(ConnectionId, Message)> {
        None
    }
}

#[test]
fn a_thread_that_panics_closes_its_machine() {
    let options = PeerOptions::new("engine");
    let hello = Hello {
        channel: Channel::Control,
        namespace: [0; 32],
        block_tokens: 16,
        cache: None,
        probe: None,
        device: None,
        nccl: None,
    };
    let config = NetConfig {
        identity: Arc::new(Identity {
            engine_id: "engine".into(),
            start_id: [0; 16],
            rank: 0,
            secret: None,
        }),
        options,
        dial_role: Role::Puller,
        dial_hello: hello.clone(),
        accept_hello: hello,
    };
    let closed = Arc::<AtomicU32>::default();
    let machine = Broken {
        is_broken: false,
        closed: Arc::clone(&closed),
    };
    let net = Net::start(config, None, machine).unwrap();
    net.shared().with(|core, _| core.machine.is_broken = true);
    let deadline = Instant::now() + Duration::from_secs(10);
    while closed.load(Ordering::Relaxed) == 0 {
        assert!(Instant::now() < deadline, "nobody was told");
        std::thread::sleep(Duration::from_millis(1));
    }
    net.close();
    assert_eq!(closed.load(Ordering::Relaxed), 1);
}
