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

    fn data_readable(&mut self, _: ConnectionId) {}

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

/// What `net` is made of in these tests.
fn config(options: PeerOptions, dial_role: Role) -> NetConfig {
    let hello = Hello {
        channel: Channel::Control,
        namespace: [0; 32],
        facts: Vec::new(),
        block_tokens: 16,
        cache: None,
        probe: None,
        device: None,
        nccl: None,
    };
    NetConfig {
        identity: Arc::new(Identity {
            engine_id: "engine".into(),
            start_id: [0; 16],
            rank: 0,
            secret: None,
        }),
        options,
        dial_role,
        dial_hello: hello.clone(),
        accept_hello: hello,
    }
}

/// Stands still once when it is told to, as a machine does that its host stops.
#[derive(Clone, Default)]
struct Stalling {
    stall_ms: Arc<AtomicU32>,
    connected: Arc<AtomicU32>,
    closed: Arc<AtomicU32>,
}

impl Machine for Stalling {
    fn connected(&mut self, _: Instant, _: ConnectionId, _: &Link, _: Option<&PeerAddress>) {
        self.connected.fetch_add(1, Ordering::Relaxed);
    }

    fn receive(&mut self, _: Instant, _: ConnectionId, _: Message) -> Result<(), &'static str> {
        Ok(())
    }

    fn closed(&mut self, _: Instant, _: ConnectionId) {
        self.closed.fetch_add(1, Ordering::Relaxed);
    }

    fn close(&mut self, _: Instant) {}

    fn data_connection(&mut self, _: TcpStream, _: Vec<u8>, _: &Link) {}

    fn data_readable(&mut self, _: ConnectionId) {}

    fn next_deadline(&self) -> Option<Instant> {
        (self.stall_ms.load(Ordering::Relaxed) > 0).then(Instant::now)
    }

    fn tick(&mut self, _: Instant) {
        let stall_ms = self.stall_ms.swap(0, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(stall_ms.into()));
    }

    fn next_message(&mut self) -> Option<(ConnectionId, Message)> {
        None
    }
}

#[test]
fn a_machine_that_stands_still_does_not_take_its_peers_for_dead() {
    const PEER_TIMEOUT: Duration = Duration::from_secs(3);
    let mut options = PeerOptions::new("engine");
    options.heartbeat = Duration::from_millis(100);
    options.peer_timeout = PEER_TIMEOUT;
    let (holder, puller) = (Stalling::default(), Stalling::default());
    let listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    let accepting = Net::start(config(options.clone(), Role::Puller), listen, holder.clone()).unwrap();
    let dialling = Net::start(config(options, Role::Puller), None, puller.clone()).unwrap();
    let address = PeerAddress::new("127.0.0.1", accepting.address().unwrap().port()).unwrap();
    let shared = dialling.shared();
    shared
        .with(|core, now| shared.connection(core, now, &address))
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while holder.connected.load(Ordering::Relaxed) + puller.connected.load(Ordering::Relaxed) < 2 {
        assert!(Instant::now() < deadline, "no connection");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Both at once, longer than a peer may be silent. A busy machine holds one of them up for less than that.
    let stall = PEER_TIMEOUT * 2;
    for (machine, net) in [(&holder, &accepting), (&puller, &dialling)] {
        machine
            .stall_ms
            .store(stall.as_millis() as u32, Ordering::Relaxed);
        let _ = net.shared().waker.wake();
    }
    std::thread::sleep(stall + PEER_TIMEOUT + Duration::from_millis(500));
    for machine in [&holder, &puller] {
        assert_eq!(
            machine.stall_ms.load(Ordering::Relaxed),
            0,
            "it did not stand still"
        );
        assert_eq!(
            machine.closed.load(Ordering::Relaxed),
            0,
            "its peer counted as dead"
        );
    }
}

#[test]
fn a_thread_that_panics_closes_its_machine() {
    let config = config(PeerOptions::new("engine"), Role::Puller);
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
