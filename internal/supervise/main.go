package supervise

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// ConfigName is the name of the keeper's blob with the configuration, as
// config.Encode wrote it, in a sealed memory file.
const ConfigName = "config"

// successorTimeout is how long a successor may take to get ready.
const successorTimeout = 20 * time.Second

// bootTimeout bounds what the start asks of the keeper.
const bootTimeout = 30 * time.Second

// Main is the supervisor process: started by the keeper, or by a supervisor that
// it is to follow. It returns the process's exit code.
func Main(ctx context.Context, log hclog.Logger, version string) int {
	return serve(ctx, log, version, nil)
}

func serve(ctx context.Context, log hclog.Logger, version string, craft func(*net.TCPConn) (*Crafted, error)) int {
	// Signals to the whole process group (Ctrl-C, a service manager) are the
	// keeper's to act on: it asks this process to stop.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	started := time.Now()
	sys.SmallPages()
	p, err := openProcess()
	if err != nil {
		log.Error("supervisor cannot start", "error", err)
		return 1
	}
	s := newSupervisor(ctx, log, patientStore{faulty(p.client)})
	s.version, s.started, s.craft = version, started, craft
	defer s.cancel()
	first, err := s.boot(p)
	if err != nil {
		log.Error("supervisor cannot start", "error", err)
		if first {
			done, cancel := context.WithTimeout(context.Background(), bootTimeout)
			defer cancel()
			_ = p.client.Done(done, 1, err.Error())
		}
		return 1
	}
	return s.serveUntilEnd(p)
}

func newSupervisor(ctx context.Context, log hclog.Logger, k store) *Supervisor {
	s := &Supervisor{log: log, keeper: k, now: time.Now,
		events: make(chan func(), 4096), stop: make(chan struct{}), done: make(chan struct{}),
		sessions: map[uint64]*session{}, workers: map[uint64]*worker{}, pools: map[string]*pool{},
		waiters: map[ownership.GroupKey]map[uint64]*session{}, groupStates: map[ownership.GroupKey]*groupState{},
		owing: map[uint64]*session{}, keys: kernelKeys{}}
	s.ctx, s.cancel = context.WithCancel(ctx)
	s.leads(0)
	return s
}

// leads begins a ledger under a number that the keeper gives out once.
func (s *Supervisor) leads(incarnation uint32) {
	s.incarnation = incarnation
	s.m = ownership.New(incarnation, func(id uint64) *ownership.Session {
		if ss := s.sessions[id]; ss != nil {
			return &ss.Session
		}
		return nil
	}, func(id uint64) (uint64, wire.Epoch) {
		ss := s.sessions[id]
		if ss == nil {
			return 0, 0
		}
		b, ok := s.led.before(int(ss.slot))
		if !ok || b.ID != id || b.Phase != slotOwned {
			return 0, 0
		}
		return b.Owner, b.Epoch
	})
}

// process is what connects this process to the keeper and to its predecessor.
type process struct {
	upg    *tableflip.Upgrader
	client *keeper.Client
	late   *sys.PacketConn // sessions whose handshake a predecessor finished late
}

func openProcess() (*process, error) {
	upg, err := tableflip.New(tableflip.Options{UpgradeTimeout: successorTimeout})
	if err != nil {
		return nil, fmt.Errorf("tableflip: %w", err)
	}
	p := &process{upg: upg}
	fd := -1
	if upg.HasParent() {
		if fd, err = inherited(upg, "keeper"); err != nil {
			return nil, err
		}
		lfd, err := inherited(upg, "late")
		if err != nil {
			return nil, err
		}
		if p.late, err = sys.NewPacketConn(lfd); err != nil {
			return nil, err
		}
	} else {
		fd, err = strconv.Atoi(os.Getenv(keeper.EnvFD))
		if err != nil {
			return nil, fmt.Errorf("%s is not set: `ktlsvisor run` starts this process, do not start it by hand", keeper.EnvFD)
		}
	}
	_ = os.Unsetenv(keeper.EnvFD)
	if p.client, err = keeper.Attach(fd); err != nil {
		return nil, err
	}
	return p, nil
}

// inherited takes a descriptor out of what tableflip passed on.
func inherited(upg *tableflip.Upgrader, name string) (int, error) {
	f, err := upg.File(name)
	if err != nil {
		return -1, fmt.Errorf("descriptor %q of the predecessor: %w", name, err)
	}
	if f == nil {
		return -1, fmt.Errorf("the predecessor did not pass on descriptor %q", name)
	}
	defer func() { _ = f.Close() }()
	return dupFile(f)
}

func dupFile(f *os.File) (fd int, err error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	if cerr := rc.Control(func(s uintptr) { fd, err = sys.Dup(int(s)) }); cerr != nil {
		return -1, cerr
	}
	return fd, err
}

// boot takes the lead and everything the keeper holds. first says that nothing was
// there yet, so an error is the whole unit's.
func (s *Supervisor) boot(p *process) (first bool, err error) {
	ctx, cancel := context.WithTimeout(s.ctx, bootTimeout)
	defer cancel()
	// What can fail because this program is another than the one before comes before
	// taking the lead: the predecessor, or another start, then goes on.
	blobs, err := readBlobs(ctx, p.client)
	if err != nil {
		return false, err
	}
	if s.cfg, err = config.Decode(blobs[ConfigName].data); err != nil {
		old, lerr := p.client.List(ctx, keeper.KindLedger)
		return lerr == nil && len(old) == 0, err
	}
	led, err := findLedger(ctx, p.client)
	if err != nil {
		return false, err
	}
	if led != nil {
		led.close()
	}
	incarnation, err := p.client.Lead(ctx)
	if err != nil {
		return false, err
	}
	s.leads(incarnation)
	s.retain = newRetainer(s.keeper, s.post)
	first, err = s.openLedger(ctx)
	if err != nil {
		return first, err
	}
	if err := s.restorePools(blobs[poolsKey.Name].meta); err != nil {
		return first, err
	}
	s.front = newFront(s.log, s.admit, func(c counter) { s.post(func() { s.led.count(c, 1) }) })
	s.front.craft = s.craft
	if err := s.openListeners(ctx, blobs); err != nil {
		return first, err
	}
	if !first {
		if err := s.recoverAll(ctx, func() { s.beginServing(p) }); err != nil {
			return false, err
		}
	}
	if s.keeperPID == 0 {
		s.keeperPID = os.Getppid() // the first supervisor is the keeper's child
	}
	s.kernel = kernelStatus()
	s.savePools()
	go s.run()
	if first {
		s.post(func() {
			for i := s.led.slots - 1; i >= 0; i-- {
				s.freeSlots = append(s.freeSlots, i)
			}
			s.waitingReady = func() { s.beginServing(p) }
			for _, pl := range s.pools {
				s.fill(pl)
			}
		})
	}
	if p.late != nil {
		go s.takeLate(p.late)
	}
	return first, nil
}

type blob struct{ data, meta []byte }

// readBlobs reads the keeper's blobs that belong to the unit, not to a session.
func readBlobs(ctx context.Context, c *keeper.Client) (map[string]blob, error) {
	entries, err := c.Get(ctx, keeper.KindBlob, 0)
	if err != nil {
		return nil, err
	}
	out := make(map[string]blob, len(entries))
	for i := range entries {
		e := &entries[i]
		b := blob{meta: e.Meta}
		if len(e.FDs) > 0 {
			var rerr error
			if b.data, rerr = sys.ReadSealedMemfd(e.FDs[0], 64<<20); rerr != nil {
				err = fmt.Errorf("%s: %w", e.Key, rerr)
			}
		}
		sys.CloseAll(e.FDs)
		out[e.Key.Name] = b
	}
	return out, err
}

func (s *Supervisor) openLedger(ctx context.Context) (first bool, err error) {
	if s.led, err = findLedger(ctx, s.keeper); s.led != nil || err != nil {
		return false, err
	}
	led, fd, err := createLedger(s.cfg.MaxSessions)
	if err != nil {
		return true, err
	}
	defer sys.CloseAll([]int{fd})
	s.led = led
	return true, s.keeper.Put(ctx, keeper.Entry{Key: keeper.Key{Kind: keeper.KindLedger}, FDs: []int{fd}})
}

// findLedger maps the ledger that the keeper holds; nil if there is none yet. It changes
// nothing.
func findLedger(ctx context.Context, k interface {
	Get(ctx context.Context, kind keeper.Kind, ids ...uint64) ([]keeper.Entry, error)
}) (*ledger, error) {
	entries, err := k.Get(ctx, keeper.KindLedger)
	if err != nil || len(entries) == 0 {
		return nil, err
	}
	defer func() {
		for i := range entries {
			sys.CloseAll(entries[i].FDs)
		}
	}()
	if len(entries[0].FDs) != 1 {
		return nil, errors.New("the keeper's entry of the ledger has no descriptor")
	}
	return openLedger(entries[0].FDs[0])
}

func (s *Supervisor) restorePools(meta []byte) error {
	var st poolState
	if len(meta) > 0 {
		if err := json.Unmarshal(meta, &st); err != nil {
			return fmt.Errorf("stored state of the pools: %w", err)
		}
	}
	s.lastWorker, s.generation, s.keeperPID = st.LastWorker, st.Generation+1, st.KeeperPID
	for _, c := range s.cfg.Pools {
		p := &pool{name: c.Name, cfg: c, command: c.Command, serving: 1, newest: 1,
			workers: map[uint64]*worker{}, parked: map[uint64]*session{}}
		for _, r := range st.Pools {
			if r.Name == c.Name {
				p.command, p.serving, p.newest = r.Command, r.Serving, r.Newest
				p.resume, p.restRate = r.Probation, r.Rate
				if r.Workers > 0 {
					p.cfg.Workers = r.Workers
				}
			}
		}
		s.pools[c.Name] = p
	}
	return nil
}

// readyChanged looks whether the first start has come so far that connections can
// be accepted: every pool has a worker.
func (s *Supervisor) readyChanged() {
	if s.waitingReady == nil {
		return
	}
	for _, p := range s.pools {
		if p.target() == nil {
			return
		}
	}
	f := s.waitingReady
	s.waitingReady = nil
	f()
}

// beginServing runs in the ledger's goroutine when everything is there.
func (s *Supervisor) beginServing(p *process) {
	for _, pl := range s.pools {
		s.resumeUpgrade(pl)
		s.dropSurplus(pl)
		s.fill(pl)
	}
	s.front.start()
	s.ready = time.Since(s.started)
	for _, l := range s.front.listeners {
		s.log.Info("serving", "listener", l.ln.Addr().String(), "pool", l.pool, "offload", l.cfg.Mode.String())
	}
	go func() {
		if p.late != nil {
			_ = p.late.Send(binary.LittleEndian.AppendUint64(nil, uint64(os.Getpid())), nil)
		}
		if err := p.upg.Ready(); err != nil {
			s.log.Warn("the predecessor could not be told that this supervisor is ready", "error", err)
		}
	}()
}

// serveUntilEnd serves the admin API until the unit stops or a successor leads.
func (s *Supervisor) serveUntilEnd(p *process) int {
	actx, acancel := context.WithCancel(s.ctx)
	defer acancel()
	b := &backend{s: s, p: p, ended: make(chan struct{})}
	terminate := p.client.Terminate()
	adminDone := make(chan error, 1)
	answered := adminDone
	go func() {
		answered <- admin.Serve(actx, s.adminListener, uint32(os.Getuid()), b, s.log.Named("admin"))
	}()
	code, adminGone := 0, false
wait:
	for {
		select {
		case <-b.ended: // stopped
			break wait
		case <-p.upg.Exit(): // a successor is ready
			acancel()
			if !adminGone {
				<-adminDone
			}
			s.finishHandshakes()
			s.log.Info("this supervisor ends; its successor serves", "generation", s.generation)
			return 0
		case <-terminate:
			terminate = nil
			go func() { _ = b.Stop(s.ctx, 0) }()
		case <-p.client.Closed():
			s.log.Error("the keeper is gone; this supervisor cannot go on")
			code = 1
			break wait
		case err := <-adminDone:
			// Sessions matter more than the admin API.
			s.log.Error("admin API ended; a restart of the supervisor brings it back", "error", err)
			adminDone = make(chan error, 1)
			adminGone = true
		}
	}
	acancel()
	if !adminGone {
		<-adminDone
	}
	if code == 0 {
		done, cancel := context.WithTimeout(context.Background(), bootTimeout)
		defer cancel()
		if err := p.client.Done(done, 0, "stopped"); err != nil {
			s.log.Error("the keeper cannot be told to end", "error", err)
			return 1
		}
		_ = admin.RemoveStale(admin.Path(s.cfg.Admin))
	}
	return code
}
