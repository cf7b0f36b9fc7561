//! Opening and accepting the streams of `/helion/session/1`.
//!
//! libp2p-stream does the same for any protocol, but it drops inbound streams that arrive while the application looks away
//! (its channel holds one), picks the connection at random, and keeps a sender for every connection there ever was. This
//! behaviour hands every stream to the event loop through libp2p's own bounded, back-pressured event channel, and opens on the
//! connection it is told.

use std::{
    collections::VecDeque,
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll, Waker},
};

use libp2p::{
    Multiaddr, PeerId, Stream, StreamProtocol,
    core::{
        Endpoint,
        transport::PortUse,
        upgrade::{InboundUpgrade, OutboundUpgrade, UpgradeInfo},
    },
    swarm::{
        ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm, NetworkBehaviour,
        NotifyHandler, StreamUpgradeError, SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
        handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound},
    },
};

/// Its name on the wire.
pub(super) const PROTOCOL: StreamProtocol = StreamProtocol::new("/helion/session/1");

/// Offered behind the real one, and spoken by nobody. Negotiation is lazy for the last name that is offered: the stream counts
/// as open before the peer has agreed, and until then the task that reads and the one that writes take each other's place in
/// the queue for the connection, so that one of them may never be woken. A link is worth its round trip: it is opened when a
/// route is chosen, not at the first step, and the answer says whether the peer takes it.
const NO_PROTOCOL: StreamProtocol = StreamProtocol::new("/helion/none");

/// What the event loop learns.
#[derive(Debug)]
pub(super) enum Event {
    /// The peer opened a stream to this one.
    Inbound { peer: PeerId, connection: ConnectionId, stream: Stream },
    /// What came of [`Behaviour::open`].
    Outbound { peer: PeerId, connection: ConnectionId, result: Result<Stream, String> },
}

/// Opens and accepts streams.
#[derive(Debug)]
pub(super) struct Behaviour {
    accepts: bool,
    queue: VecDeque<ToSwarm<Event, Open>>,
    waker: Option<Waker>,
}

/// To a connection: open a stream.
#[derive(Debug)]
pub(super) struct Open;

impl Behaviour {
    /// A behaviour that lets others open streams only if `accepts`.
    pub(super) fn new(accepts: bool) -> Self {
        Self { accepts, queue: VecDeque::new(), waker: None }
    }

    /// Opens a stream on a connection that exists. Answered by one [`Event::Outbound`], unless the connection closes first.
    pub(super) fn open(&mut self, peer: PeerId, connection: ConnectionId) {
        let handler = NotifyHandler::One(connection);
        self.queue.push_back(ToSwarm::NotifyHandler { peer_id: peer, handler, event: Open });
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Event;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(Handler::new(self.accepts))
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(Handler::new(self.accepts))
    }

    fn on_swarm_event(&mut self, _: FromSwarm<'_>) {}

    fn on_connection_handler_event(&mut self, peer: PeerId, connection: ConnectionId, event: THandlerOutEvent<Self>) {
        self.queue.push_back(ToSwarm::GenerateEvent(match event {
            FromHandler::Inbound(stream) => Event::Inbound { peer, connection, stream },
            FromHandler::Outbound(result) => Event::Outbound { peer, connection, result },
        }));
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Event, THandlerInEvent<Self>>> {
        match self.queue.pop_front() {
            Some(event) => Poll::Ready(event),
            None => {
                self.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// One connection's part.
#[derive(Debug)]
pub(super) struct Handler {
    accepts: bool,
    to_open: usize,
    events: VecDeque<FromHandler>,
}

/// From a connection.
#[derive(Debug)]
pub(super) enum FromHandler {
    Inbound(Stream),
    Outbound(Result<Stream, String>),
}

impl Handler {
    fn new(accepts: bool) -> Self {
        Self { accepts, to_open: 0, events: VecDeque::new() }
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Open;
    type ToBehaviour = FromHandler;
    type InboundProtocol = Upgrade;
    type OutboundProtocol = Upgrade;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = ();

    fn listen_protocol(&self) -> SubstreamProtocol<Upgrade> {
        SubstreamProtocol::new(if self.accepts { Upgrade::Accept } else { Upgrade::Deny }, ())
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ConnectionHandlerEvent<Upgrade, (), FromHandler>> {
        // libp2p polls again after every event and message that it brings here, so no waker is needed.
        if let Some(event) = self.events.pop_front() {
            return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(event));
        }
        if self.to_open > 0 {
            self.to_open -= 1;
            let protocol = SubstreamProtocol::new(Upgrade::Open, ());
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, Open: Open) {
        self.to_open += 1;
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<'_, Upgrade, Upgrade>) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol, .. }) => {
                self.events.push_back(FromHandler::Inbound(protocol));
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol, .. }) => {
                self.events.push_back(FromHandler::Outbound(Ok(protocol)));
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { error, .. }) => {
                let reason = match error {
                    StreamUpgradeError::Timeout => "opening a stream took too long".to_owned(),
                    StreamUpgradeError::NegotiationFailed | StreamUpgradeError::Apply(NotSpoken) => {
                        format!("the peer does not speak {PROTOCOL}")
                    }
                    StreamUpgradeError::Io(error) => error.to_string(),
                };
                self.events.push_back(FromHandler::Outbound(Err(reason)));
            }
            _ => {}
        }
    }
}

/// Nothing to negotiate but the name.
#[derive(Debug, Clone)]
pub(super) enum Upgrade {
    /// Streams are not accepted.
    Deny,
    Accept,
    Open,
}

impl UpgradeInfo for Upgrade {
    type Info = StreamProtocol;
    type InfoIter = std::iter::Flatten<std::array::IntoIter<Option<StreamProtocol>, 2>>;

    fn protocol_info(&self) -> Self::InfoIter {
        match self {
            Self::Deny => [None, None],
            Self::Accept => [Some(PROTOCOL), None],
            Self::Open => [Some(PROTOCOL), Some(NO_PROTOCOL)],
        }
        .into_iter()
        .flatten()
    }
}

impl InboundUpgrade<Stream> for Upgrade {
    type Output = Stream;
    type Error = Infallible;
    type Future = Ready<Result<Stream, Infallible>>;

    fn upgrade_inbound(self, stream: Stream, _: StreamProtocol) -> Self::Future {
        ready(Ok(stream))
    }
}

/// The peer took none of the protocols.
#[derive(Debug)]
pub(super) struct NotSpoken;

impl OutboundUpgrade<Stream> for Upgrade {
    type Output = Stream;
    type Error = NotSpoken;
    type Future = Ready<Result<Stream, NotSpoken>>;

    fn upgrade_outbound(self, stream: Stream, protocol: StreamProtocol) -> Self::Future {
        ready(if protocol == PROTOCOL { Ok(stream) } else { Err(NotSpoken) })
    }
}
