// The reviews: what readers say of a book (Go, gRPC).
//
// VERSION=v1 knows texts, VERSION=v2 knows stars too. The title comes from the catalogue, to which
// the W3C trace context is passed on.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "bookshop/reviews/reviewspb"
)

var said = map[string][]*pb.Review{
	"9780131103627": {
		{Reader: "Ada", Text: "Short, and nothing is missing.", Stars: 5},
		{Reader: "Linus", Text: "The exercises are the book.", Stars: 4},
	},
	"9780262510875": {{Reader: "Grace", Text: "Read it twice.", Stars: 5}},
	"9781718503106": {{Reader: "Ken", Text: "The chapter on ownership is worth it alone.", Stars: 4}},
}

type server struct {
	pb.UnimplementedReviewsServer
	version string
	catalog string
	client  *http.Client
}

func (s *server) seen(review *pb.Review) *pb.Review {
	if s.version == "v1" {
		return &pb.Review{Reader: review.Reader, Text: review.Text}
	}
	return review
}

func (s *server) List(ctx context.Context, request *pb.ListRequest) (*pb.ListResponse, error) {
	title, err := s.title(ctx, request.Isbn)
	if err != nil {
		return nil, err
	}
	response := &pb.ListResponse{Title: title, Version: s.version}
	for _, review := range said[request.Isbn] {
		response.Reviews = append(response.Reviews, s.seen(review))
	}
	return response, nil
}

func (s *server) Watch(request *pb.WatchRequest, stream grpc.ServerStreamingServer[pb.Review]) error {
	for sent := uint32(0); ; {
		for _, reviews := range said {
			for _, review := range reviews {
				if sent == request.Limit {
					return nil
				}
				if err := stream.Send(s.seen(review)); err != nil {
					return err
				}
				sent++
				select {
				case <-time.After(100 * time.Millisecond):
				case <-stream.Context().Done():
					return stream.Context().Err()
				}
			}
		}
	}
}

// title asks the catalogue.
func (s *server) title(ctx context.Context, isbn string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.catalog+"/books/"+isbn, nil)
	if err != nil {
		return "", status.Errorf(codes.InvalidArgument, "%v", err)
	}
	if incoming, ok := metadata.FromIncomingContext(ctx); ok {
		for _, name := range []string{"traceparent", "tracestate"} {
			for _, value := range incoming.Get(name) {
				request.Header.Add(name, value)
			}
		}
	}
	answer, err := s.client.Do(request)
	if err != nil {
		return "", status.Errorf(codes.Unavailable, "the catalogue does not answer: %v", err)
	}
	defer answer.Body.Close()
	switch answer.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return "", status.Errorf(codes.NotFound, "there is no book %s", isbn)
	default:
		return "", status.Errorf(codes.Unavailable, "the catalogue answered %s", answer.Status)
	}
	var book struct{ Title string }
	if err := json.NewDecoder(answer.Body).Decode(&book); err != nil {
		return "", status.Errorf(codes.Internal, "the catalogue's answer is not JSON: %v", err)
	}
	return book.Title, nil
}

func env(name, fallback string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return fallback
}

func main() {
	listener, err := net.Listen("tcp", ":9090")
	if err != nil {
		log.Fatal(err)
	}
	s := &server{
		version: env("VERSION", "v1"),
		catalog: env("CATALOG", "http://catalog:8080"),
		client:  &http.Client{Timeout: 5 * time.Second},
	}
	g := grpc.NewServer()
	pb.RegisterReviewsServer(g, s)
	healthpb.RegisterHealthServer(g, health.NewServer())
	go func() {
		terminate := make(chan os.Signal, 1)
		signal.Notify(terminate, syscall.SIGTERM)
		<-terminate
		g.GracefulStop()
	}()
	fmt.Printf("reviews %s listen on 9090\n", s.version)
	if err := g.Serve(listener); err != nil {
		log.Fatal(err)
	}
}
